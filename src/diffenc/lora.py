"""Low-rank adapters (LoRA) on the cross-attention of a U-Net, injected and run by peft.

Adapters are named; several live in one U-Net. Under a half-precision U-Net their weights stay in
float32: in float16 they do not survive training.
"""

import copy
import json
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffenc.errors import BackboneError, ConfigError, OutputError, near_matches

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""The linear layers of a cross-attention, all of which are adapted by default."""
_PEFT_WEIGHTS, _DIFFUSERS_WEIGHTS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
_PEFT_CONFIG, _ORIGIN = "adapter_config.json", "diffenc.json"
_OTHER = 0.02
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """How an adapter is built.

    Attributes:
        rank: Of the update.
        alpha: The update is scaled by alpha / rank; None is the rank, so by 1.
        dropout: Probability with which inputs of the update are zeroed in training.
        projections: Which linear layers of each cross-attention; see `PROJECTIONS`.

    Raises:
        ConfigError: A value is out of range or unknown.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    projections: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank must be an int of 1 or more, got {self.rank!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"alpha must be above 0, got {self.alpha!r}")
        unknown = [name for name in self.projections if name not in PROJECTIONS]
        if unknown or not self.projections:
            raise ConfigError(
                f"projections must be some of {list(PROJECTIONS)}, got {list(self.projections)}"
            )


def add_lora(
    unet: nn.Module,
    attentions: Sequence[str],
    options: LoraOptions,
    *,
    name: str = "default",
    only: Collection[str] | None = None,
) -> None:
    """Add an adapter that changes nothing until it is trained, and make it the active one.

    Only its own parameters require a gradient afterwards, beside what did before.

    Args:
        unet: A `UNet2DConditionModel`.
        attentions: Module paths of cross-attentions, see
            `diffenc.attention.cross_attention_layers`.
        options: Rank, scale, dropout and projections.
        name: Of the adapter.
        only: Paths of the projections that may be adapted; None is all of them.

    Raises:
        ConfigError: The name is taken or cannot be one, or nothing is left to adapt.
    """
    from peft import LoraConfig

    _check_free(unet, name)
    every = [f"{path}.{part}" for path in attentions for part in options.projections]
    targets = [path for path in every if only is None or path in only]
    if not targets:
        raise ConfigError(
            f"the taps depend on no {' or '.join(options.projections)} of a cross-attention, so "
            "there is nothing to adapt; read a later tap"
        )
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha or options.rank,  # type: ignore[arg-type]  # floats work
        lora_dropout=options.dropout,
        target_modules=targets,
    )
    _inject(unet, config, name, trainable=True)
    set_lora(unet, name)


def lora_names(unet: nn.Module) -> list[str]:
    """Names of the adapters in a U-Net, in the order in which they came."""
    return list(getattr(unet, "peft_config", {}))


def set_lora(unet: nn.Module, name: str | None) -> None:
    """Use one adapter alone; None uses none.

    Raises:
        ConfigError: There is no such adapter.
    """
    if name is not None:
        require_lora(unet, name)
    unmerge_lora(unet)
    for layer in _layers(unet):
        if name is not None and name in layer.lora_A:
            required = {p: p.requires_grad for p in layer.parameters()}
            layer.enable_adapters(True)
            layer.set_adapter(name)
            for parameter, state in required.items():  # peft freezes the adapters left aside
                parameter.requires_grad_(state)
        else:
            layer._disable_adapters = True


def active_lora(unet: nn.Module) -> str | None:
    """Name of the adapter in use, or None."""
    for layer in _layers(unet):
        if not layer._disable_adapters:
            name: str = layer.active_adapters[0]
            return name
    return None


def require_lora(unet: nn.Module, name: str) -> None:
    """Raise a `ConfigError` that lists the adapters unless there is one by that name."""
    known = lora_names(unet)
    if name not in known:
        raise ConfigError(
            f"there is no adapter {name!r}; known are {known}.{near_matches(name, known)}"
        )


@contextmanager
def lora_disabled(unet: nn.Module) -> Iterator[None]:
    """Run the U-Net as if it had no adapter."""
    layers = list(_layers(unet))
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def merge_lora(unet: nn.Module) -> None:
    """Add the active adapter to the weights, so that it costs nothing; `unmerge_lora` undoes it.

    The weights as they were are kept beside: taking the sum apart again would round in half
    precision. While merged, the adapter gets no gradient.
    """
    for layer in _layers(unet):
        if not layer._disable_adapters and not layer.merged:
            plain = layer.get_base_layer().weight.data
            layer.merge(safe_merge=True)  # into a copy
            layer._unmerged_weight = plain


def unmerge_lora(unet: nn.Module) -> None:
    """Put the weights back as they were before `merge_lora`."""
    for layer in _layers(unet):
        if not layer.merged:
            continue
        plain = layer.__dict__.pop("_unmerged_weight", None)
        if plain is None:  # merged by peft itself
            layer.unmerge()
        else:
            weight = layer.get_base_layer().weight
            weight.data = plain.to(weight.device, weight.dtype)
            layer.merged_adapters.clear()


def is_merged(unet: nn.Module) -> bool:
    """Whether an adapter is part of the weights now."""
    return any(layer.merged for layer in _layers(unet))


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module as if it had no adapter, merged ones taken out; on the CPU."""
    taken_out = {
        f"{path}.base_layer.weight": layer._unmerged_weight
        for path, layer in module.named_modules()
        if "_unmerged_weight" in layer.__dict__
    }
    return {
        path.replace(".base_layer.", "."): taken_out.get(path, value).detach().cpu().contiguous()
        for path, value in module.state_dict().items()
        if ".lora_" not in path
    }


def lora_parameters(unet: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Parameters of an adapter by their path in the U-Net.

    Raises:
        ConfigError: There is no such adapter.
    """
    require_lora(unet, name)
    return {
        path: parameter
        for path, parameter in unet.named_parameters()
        if f".lora_A.{name}." in path or f".lora_B.{name}." in path
    }


def keep_precise(unet: nn.Module) -> None:
    """Bring adapter weights that are in float16 to float32."""
    for name in lora_names(unet):
        for parameter in lora_parameters(unet, name).values():
            if parameter.dtype == torch.float16:
                parameter.data = parameter.data.float()


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
    _check_free(unet, name)
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
    _inject(unet, config, name, trainable=trainable)
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


def _inject(unet: nn.Module, config: Any, name: str, *, trainable: bool) -> None:
    """Put the layers in; only what required a gradient before, and these if asked, does after."""
    from peft import inject_adapter_in_model

    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are wanted
        inject_adapter_in_model(config, unet, adapter_name=name)
    unet.requires_grad_(False)
    unet.train(unet.training)  # new dropout layers begin in training mode
    for parameter in lora_parameters(unet, name).values():
        parameter.data = parameter.data.float()
    for parameter in (*trained, *(lora_parameters(unet, name).values() if trainable else ())):
        parameter.requires_grad_(True)


def _check_free(unet: nn.Module, name: str) -> None:
    if name in lora_names(unet):
        raise ConfigError(f"there is an adapter {name!r} already; known are {lora_names(unet)}")
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"an adapter's name must be letters, digits and underscores, and no attribute of a "
            f"torch module, got {name!r}; try {name + '_adapter'!r}"
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


def _layers(unet: nn.Module) -> Iterator[Any]:
    """Modules that peft put in place of linear layers."""
    return (module for module in unet.modules() if hasattr(module, "lora_A"))
