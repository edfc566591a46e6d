"""Adapters in files: peft's own layout, and beside it one that diffusers reads."""

import copy
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffenc.errors import BackboneError, OutputError
from diffenc.lora.adapters import inject, lora_parameters, require_free, set_lora

_PEFT_WEIGHTS, _DIFFUSERS_WEIGHTS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
_PEFT_CONFIG, _ORIGIN = "adapter_config.json", "diffenc.json"
_OTHER = 0.02
_PEFT_PREFIX = "base_model.model."


def fingerprint(unet: nn.Module) -> list[float]:
    """Numbers by which a U-Net is known again: of weights that no adapter changes.

    Size and one projection of each, in units in which rounding to half precision moves them by
    about 0.001, and other weights by more than `_OTHER`.
    """
    found = []
    for path in ("conv_in", "time_embedding.linear_1", "down_blocks.0.resnets.0.conv1"):
        weight: Any = unet.get_submodule(path).weight
        values = weight.detach().cpu().double().flatten()
        pattern = torch.cos(torch.arange(values.numel(), dtype=torch.float64))
        size, unit = float(values.norm()), math.sqrt(values.numel())
        along = float(values @ pattern) / (size * float(pattern.norm()) or 1.0)
        found += [unit * math.log(size or 1.0), unit * along]
    return found


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
        unet: A U-Net with the adapter.
        folder: Made where it does not exist.
        name: Of the adapter.
        origin: What else `read_origin` shall tell: plain values, such as the backbone's name.

    Raises:
        ConfigError: There is no such adapter.
        OutputError: The folder cannot be written.
    """
    weights = {
        path.replace(f".{name}.", ".", 1): parameter.detach().cpu().contiguous()
        for path, parameter in lora_parameters(unet, name).items()
    }
    targets = sorted({path.partition(".lora_")[0] for path in weights})
    scales = {path: _get(unet, path).scaling[name] for path in targets}
    peft = {f"{_PEFT_PREFIX}{path}": value for path, value in weights.items()}
    diffusers = {
        f"unet.{path}": value * scales[path.partition(".lora_")[0]] if ".lora_B." in path else value
        for path, value in weights.items()
    }
    config: Any = copy.copy(unet.peft_config[name])  # type: ignore[index]
    # peft shortens paths to endings that are unique in this very model, and not in a longer one.
    config.target_modules = targets
    told = {**(origin or {}), "fingerprint": fingerprint(unet)}
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / _PEFT_CONFIG).unlink(missing_ok=True)  # written last: without it nothing is read
        for file, content in ((_PEFT_WEIGHTS, peft), (_DIFFUSERS_WEIGHTS, diffusers)):
            partial = target / f"{file}.partial"
            save_file(content, partial, metadata={"format": "pt"})
            partial.replace(target / file)
        (target / _ORIGIN).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        config.save_pretrained(str(target))
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {target}: {error}") from error


def read_origin(folder: "str | os.PathLike[str]") -> dict[str, Any]:
    """What `save_lora` noted beside an adapter; empty for one of peft's own.

    Raises:
        BackboneError: The note is broken.
    """
    path = Path(folder) / _ORIGIN
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BackboneError(f"{path} is broken: {error}") from error


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
        folder: With `adapter_config.json` and `adapter_model.safetensors`.
        name: Under which it is known from now on.
        trainable: Whether its weights require a gradient.
        only: Paths of the projections that may be adapted; None is all of them.

    Raises:
        BackboneError: The folder holds no whole adapter, or one for another U-Net.
        ConfigError: The name is taken or cannot be one.
    """
    source = Path(folder)
    require_free(unet, name)
    config, weights = _read(source)
    targets = _require_fitting(unet, weights, config.r, source)
    _require_own(unet, source)
    if unused := sorted(path for path in targets if only is not None and path not in only):
        raise BackboneError(
            f"{source} is an adapter for other taps: {unused[0]} and {len(unused) - 1} more of its "
            "layers have no effect on the features that are read here; read the taps that it was "
            "trained with, or later ones"
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

    try:
        config = LoraConfig.from_pretrained(str(source))
        state = load_file(source / _PEFT_WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise BackboneError(
            f"{source} holds no LoRA adapter ({_PEFT_CONFIG} and {_PEFT_WEIGHTS}): {error}"
        ) from error
    if not isinstance(config, LoraConfig):
        raise BackboneError(f"{source} holds a {config.peft_type} adapter; diffenc reads LoRA")
    extras = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")
    if more := [extra for extra in extras if getattr(config, extra, None)]:
        raise BackboneError(
            f"{source} is no plain LoRA adapter: it has {', '.join(more)}; diffenc reads adapters "
            "of one rank, without more"
        )
    return config, {path.removeprefix(_PEFT_PREFIX): value for path, value in state.items()}


def _require_own(unet: nn.Module, source: Path) -> None:
    """Raise unless the adapter was trained in this U-Net, or nothing is known about that."""
    origin = read_origin(source)
    known, own = origin.get("fingerprint", []), fingerprint(unet)
    if known and (
        len(known) != len(own) or any(abs(a - b) > _OTHER for a, b in zip(known, own, strict=True))
    ):
        raise BackboneError(
            f"{source} is an adapter for another backbone, {origin.get('backbone', 'unknown')!r}: "
            "its U-Net has other weights; load that one"
        )


def _require_fitting(
    unet: nn.Module, weights: Mapping[str, Tensor], rank: int, source: Path
) -> list[str]:
    """Paths of the linear layers that the weights are for, once all of them fit."""
    targets = sorted({path.partition(".lora_")[0] for path in weights})
    modules = dict(unet.named_modules())
    for target in targets:
        module: Any = modules.get(target)
        if not hasattr(module, "in_features"):
            raise BackboneError(
                f"{source} is an adapter for another model, or for one cut behind later taps: "
                f"this U-Net has no linear layer {target!r}"
            )
        sizes = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
        for part, wants in sizes.items():
            value = weights.get(f"{target}.lora_{part}.weight")
            if value is None:
                raise BackboneError(f"{source} is incomplete: it lacks lora_{part} of {target}")
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


def _get(unet: nn.Module, path: str) -> Any:
    return unet.get_submodule(path)
