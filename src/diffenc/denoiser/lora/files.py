"""Adapters in files: peft's own layout, and beside it one that diffusers reads."""

import copy
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffenc.denoiser.lora.adapters import inject, lora_parameters, require_free, set_lora
from diffenc.denoiser.transformers import layout_of, word_for
from diffenc.errors import BackboneError, ConfigError, OutputError
from diffenc.runtime.inference import lasting
from diffenc.storage.names import checked_path, is_file, is_folder, printable, reason
from diffenc.storage.reading import read_json
from diffenc.storage.schema import checked
from diffenc.storage.tensors import read_tensors, write_tensors
from diffenc.storage.writing import begin_folder, reporting, write_json

_PEFT_WEIGHTS, _DIFFUSERS_WEIGHTS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
_PEFT_CONFIG, _ORIGIN = "adapter_config.json", "diffenc.json"
_OTHER = 0.02
_NOTED = {"fingerprint": list[float], "taps": list[str], "backbone": str}
_PEFT_PREFIX = "base_model.model."


def fingerprint(unet: nn.Module) -> list[float]:
    """Numbers by which a U-Net is known again: of weights without any adapter.

    Size and one projection of each, in units in which rounding to half precision moves them by
    about 0.001, and other weights by more than `_OTHER`.
    """
    numbers = []
    for path in _unadapted_layers(unet):
        layer: Any = unet.get_submodule(path)
        weight = vars(layer).get("_unmerged_weight", layer.weight)  # as it was before a merge
        values = weight.detach().cpu().double().flatten()
        pattern = torch.cos(torch.arange(values.numel(), dtype=torch.float64, device="cpu"))
        size, unit = float(values.norm()), math.sqrt(values.numel())
        along = float(values @ pattern) / (size * float(pattern.norm()) or 1.0)
        numbers += [unit * math.log(size or 1.0), unit * along]
    return numbers


def _unadapted_layers(denoiser: nn.Module) -> Sequence[str]:
    """Three layers that no adapter changes and no cut removes."""
    if (layout := layout_of(denoiser)) is None:
        return "conv_in", "time_embedding.linear_1", "down_blocks.0.resnets.0.conv1"
    outside = tuple(f"{blocks}." for blocks in layout.blocks)
    layers = [
        path
        for path, layer in denoiser.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not path.startswith(outside)
    ]
    return [path for path in layers if path != "proj_out"][:3]


def save_lora(
    unet: nn.Module,
    folder: "str | os.PathLike[str]",
    *,
    name: str = "default",
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter twice: in peft's own layout, and keyed for diffusers.

    `PeftModel.from_pretrained(unet, folder)` reads the first, `pipe.load_lora_weights(folder)` the
    second, in which the scale alpha / rank is multiplied into the weights.

    Args:
        unet: U-Net that has the adapter.
        folder: Folder to write to; it is made where it does not exist.
        name: Name of the adapter.
        origin: Plain values, such as the backbone's name, that `read_origin` reads again; None is
            none.

    Raises:
        ConfigError: There is no such adapter, or its layers have several scales.
        OutputError: The folder cannot be written.
    """
    weights = {
        path.replace(f".{name}.", ".", 1): parameter.detach().cpu().contiguous()
        for path, parameter in lora_parameters(unet, name).items()
    }
    targets = sorted({path.partition(".lora_")[0] for path in weights})
    scales = {path: _get(unet, path).scaling[name] for path in targets}
    peft = {f"{_PEFT_PREFIX}{path}": value for path, value in weights.items()}
    part = "unet" if layout_of(unet) is None else "transformer"
    diffusers = {
        f"{part}.{path}": value * scales[path.partition(".lora_")[0]]
        if ".lora_B." in path
        else value
        for path, value in weights.items()
    }
    config: Any = copy.copy(unet.peft_config[name])  # type: ignore[index]
    # peft shortens paths to endings that are unique in this very model, and not in a longer one.
    config.target_modules = targets
    config.lora_alpha = _alpha(config, set(scales.values()), name)
    facts = {**(origin or {}), "fingerprint": fingerprint(unet)}
    target = begin_folder(checked_path("an adapter", folder, error=OutputError), _PEFT_CONFIG)
    write_tensors(target / _PEFT_WEIGHTS, peft)
    write_tensors(target / _DIFFUSERS_WEIGHTS, diffusers)
    write_json(target / _ORIGIN, facts)
    with reporting(target):
        config.save_pretrained(str(target))


def _alpha(config: Any, scales: set[float], name: str) -> float:
    """The alpha of an adapter's scale, which peft and diffusers let a program change."""
    unit = math.sqrt(config.r) if config.use_rslora else config.r
    if scales == {config.lora_alpha / unit}:
        return config.lora_alpha  # type: ignore[no-any-return]
    if len(scales) > 1:
        raise ConfigError(
            f"layers of the adapter {name!r} have the scales {sorted(scales)}, and a saved one has "
            "one alone; set it by layer.set_scale(name, 1.0) of each"
        )
    return scales.pop() * unit


def read_origin(folder: "str | os.PathLike[str]") -> dict[str, Any]:
    """What `save_lora` noted beside an adapter; empty for one of peft's own.

    Raises:
        BackboneError: The note is broken.
    """
    path = checked_path("an adapter", folder, error=BackboneError) / _ORIGIN
    if not is_file(path):
        return {}
    try:
        origin: dict[str, Any] = read_json(path)
        for key, kind in _NOTED.items():
            if key in origin:
                checked(origin[key], kind, key)
    except ConfigError as error:
        raise BackboneError(f"{path} is broken: {error}") from error
    return origin


@lasting
def load_lora(
    unet: nn.Module,
    folder: "str | os.PathLike[str]",
    *,
    name: str = "default",
    trainable: bool = False,
    only: Collection[str] | None = None,
) -> None:
    """Read an adapter that `save_lora`, or peft, wrote, and make it the active one.

    Args:
        unet: A `UNet2DConditionModel`; it is left as it is where the adapter is refused.
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: Name of the adapter from now on.
        trainable: Whether its weights require a gradient.
        only: Paths of the layers that may be adapted; None is all linear layers and convolutions.

    Raises:
        BackboneError: The folder holds no whole adapter, or one for another U-Net.
        ConfigError: The name is taken or cannot be one.
    """
    source = checked_path("an adapter", folder, error=BackboneError)
    config, weights = _read(source)
    require_free(unet, name)
    targets = _require_fitting(unet, weights, config.r, source)
    _require_own(unet, source)
    if unused := sorted(path for path in targets if only is not None and path not in only):
        raise BackboneError(
            f"{source} is an adapter for other taps: {unused[0]}"
            + (f" and {len(unused) - 1} more of its layers have" if unused[1:] else " has")
            + " no effect on the features that are read here, which are complete before; read the "
            "taps that it was trained with, or later ones"
        )
    config.target_modules = targets
    inject(unet, config, name, trainable=trainable)
    own = lora_parameters(unet, name)
    with torch.no_grad():
        for path, parameter in own.items():
            parameter.copy_(weights[path.replace(f".{name}.", ".", 1)])
    set_lora(unet, name)


def _read(source: Path) -> tuple[Any, dict[str, Tensor]]:
    from peft import LoraConfig

    if not is_folder(source):
        raise BackboneError(
            f"there is no folder {printable(source)}; an adapter is a folder with {_PEFT_CONFIG} "
            f"and {_PEFT_WEIGHTS}, as save_lora and peft write it"
        )
    try:
        read_json(source / _PEFT_CONFIG)  # which peft would look for on the Hub
        state = read_tensors(source / _PEFT_WEIGHTS, finite=True)
        config: Any = LoraConfig.from_pretrained(str(source))
        kinds = {"r": int, "lora_alpha": float, "lora_dropout": float, "use_rslora": bool}
        for name, kind in kinds.items():
            checked(getattr(config, name), kind, name)
    except Exception as error:  # peft raises whatever a broken config makes it raise
        raise BackboneError(
            f"{source} holds no LoRA adapter ({_PEFT_CONFIG} and {_PEFT_WEIGHTS}): {reason(error)}"
        ) from error
    if not isinstance(config, LoraConfig):
        raise BackboneError(f"{source} holds a {config.peft_type} adapter; diffenc reads LoRA")
    extras = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")
    more = [extra for extra in extras if getattr(config, extra, None)]
    if config.init_lora_weights not in (True, False, "gaussian"):  # others change the U-Net itself
        more.append("init_lora_weights")
    if more:
        raise BackboneError(
            f"{source} is no plain LoRA adapter: it has {', '.join(more)}; diffenc reads adapters "
            "of one rank, without more"
        )
    return config, {path.removeprefix(_PEFT_PREFIX): value for path, value in state.items()}


def _require_own(unet: nn.Module, source: Path) -> None:
    """Raise unless the adapter was trained in this U-Net, or nothing is known about that."""
    origin = read_origin(source)
    if "fingerprint" not in origin:
        return
    known, own = origin["fingerprint"], fingerprint(unet)
    # A distance that is NaN is none that is small.
    alike = len(known) == len(own) and all(
        abs(a - b) <= _OTHER for a, b in zip(known, own, strict=True)
    )
    if not alike:
        raise BackboneError(
            f"{source} is an adapter for another backbone, {origin.get('backbone', 'unknown')!r}: "
            f"its {word_for(unet)} has other weights; load that one"
        )


def _require_fitting(
    unet: nn.Module, weights: Mapping[str, Tensor], rank: int, source: Path
) -> list[str]:
    """Paths of the linear layers and convolutions that the weights are for, once all fit."""
    targets = sorted({path.partition(".lora_")[0] for path in weights})
    modules = dict(unet.named_modules())
    for target in targets:
        sizes = _sizes(modules.get(target), rank)
        if not sizes:
            raise BackboneError(
                f"{source} is an adapter for another model, or for one cut behind later taps: "
                f"this {word_for(unet)} has no linear layer or convolution {target!r}"
            )
        for part, wants in sizes.items():
            value = weights.get(f"{target}.lora_{part}.weight")
            if value is None:
                raise BackboneError(f"{source} is incomplete: it lacks lora_{part} of {target}")
            if not value.is_floating_point():
                raise BackboneError(f"{source}: lora_{part} of {target} holds {value.dtype}")
            if tuple(value.shape) != wants:
                raise BackboneError(
                    f"{source} is an adapter for another model: lora_{part} of {target} must be "
                    f"{wants} here and is {tuple(value.shape)}"
                )
    if not targets or len(weights) != 2 * len(targets):
        raise BackboneError(
            f"{source} holds {len(weights)} tensors for {len(targets)} layers; LoRA has two each"
        )
    return targets


def _sizes(module: Any, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the two weights of an adapter on a layer; empty where it can have none."""
    layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if isinstance(layer, nn.Linear):
        return {"A": (rank, layer.in_features), "B": (layer.out_features, rank)}
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return {
            "A": (rank, layer.in_channels, *layer.kernel_size),
            "B": (layer.out_channels, rank, 1, 1),
        }
    return {}


def _get(unet: nn.Module, path: str) -> Any:
    return unet.get_submodule(path)
