"""Low-rank adapters (LoRA) on the cross-attention of a U-Net, injected and run by peft.

Adapters are named; several live in one U-Net. Under a half-precision U-Net their weights stay in
float32: in float16 they do not survive training.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
    unet: nn.Module, attentions: Sequence[str], options: LoraOptions, *, name: str = "default"
) -> None:
    """Add an adapter that changes nothing until it is trained, and make it the active one.

    Only its own parameters require a gradient afterwards, beside what did before.

    Args:
        unet: A `UNet2DConditionModel`.
        attentions: Module paths of cross-attentions, see
            `diffenc.attention.cross_attention_layers`.
        options: Rank, scale, dropout and projections.
        name: Of the adapter.

    Raises:
        ConfigError: The name is taken or cannot be one, or no cross-attention was given.
    """
    from peft import LoraConfig

    _check_free(unet, name)
    if not attentions:
        raise ConfigError(
            "no cross-attention runs before the last tap, so there is nothing to adapt; read a "
            "later tap"
        )
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha or options.rank,  # type: ignore[arg-type]  # floats work
        lora_dropout=options.dropout,
        target_modules=[f"{path}.{part}" for path in attentions for part in options.projections],
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
    for layer in _layers(unet):
        if name is not None and name in layer.lora_A:
            required = {p: p.requires_grad for p in layer.parameters()}
            layer.enable_adapters(True)
            layer.set_adapter(name)
            for parameter, state in required.items():  # peft freezes the adapters left aside
                parameter.requires_grad_(state)
        else:
            layer._disable_adapters = True


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
    """Add the active adapter to the weights, so that it costs nothing; `unmerge_lora` undoes it."""
    for layer in _layers(unet):
        if not layer._disable_adapters:
            layer.merge(safe_merge=True)


def unmerge_lora(unet: nn.Module) -> None:
    """Take merged adapters out of the weights again, up to rounding."""
    for layer in _layers(unet):
        if layer.merged:
            layer.unmerge()


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


def save_lora(unet: nn.Module, folder: "str | os.PathLike[str]", *, name: str = "default") -> None:
    """Write an adapter twice: in peft's own layout, and keyed for diffusers.

    `PeftModel.from_pretrained(unet, folder)` reads the first, `pipe.load_lora_weights(folder)` the
    second, in which the scale alpha / rank is multiplied into the weights.

    Raises:
        ConfigError: There is no such adapter.
        OutputError: The folder cannot be written.
    """
    state = {
        path.replace(f".{name}.", ".", 1): parameter.detach().cpu().contiguous()
        for path, parameter in lora_parameters(unet, name).items()
    }
    config: Any = unet.peft_config[name]  # type: ignore[index]
    scale = config.lora_alpha / config.r
    peft = {f"{_PEFT_PREFIX}{path}": value for path, value in state.items()}
    diffusers = {
        f"unet.{path}": value * scale if ".lora_B." in path else value
        for path, value in state.items()
    }
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file, content in ((_PEFT_WEIGHTS, peft), (_DIFFUSERS_WEIGHTS, diffusers)):
            partial = target / f"{file}.partial"
            save_file(content, partial, metadata={"format": "pt"})
            partial.replace(target / file)
        config.save_pretrained(str(target))
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {target}: {error}") from error


def load_lora(
    unet: nn.Module,
    folder: "str | os.PathLike[str]",
    *,
    name: str = "default",
    trainable: bool = False,
) -> None:
    """Read an adapter that `save_lora`, or peft, wrote, and make it the active one.

    Args:
        unet: A `UNet2DConditionModel`.
        folder: With `adapter_config.json` and `adapter_model.safetensors`.
        name: Under which it is known from now on.
        trainable: Whether its weights require a gradient.

    Raises:
        BackboneError: The folder holds no whole adapter, or one for another U-Net.
        ConfigError: The name is taken or cannot be one.
    """
    from peft import LoraConfig

    source = Path(folder)
    _check_free(unet, name)
    try:
        config = LoraConfig.from_pretrained(str(source))
        state = load_file(source / _PEFT_WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise BackboneError(
            f"{source} holds no LoRA adapter (adapter_config.json and {_PEFT_WEIGHTS}): {error}"
        ) from error
    weights = {path.removeprefix(_PEFT_PREFIX): value for path, value in state.items()}
    _require_fitting(unet, weights, source)
    _inject(unet, config, name, trainable=trainable)
    own = lora_parameters(unet, name)
    with torch.no_grad():
        for path, parameter in own.items():
            parameter.copy_(weights[path.replace(f".{name}.", ".", 1)])
    set_lora(unet, name)


def _inject(unet: nn.Module, config: Any, name: str, *, trainable: bool) -> None:
    """Put the layers in; only what required a gradient before, and these if asked, does after."""
    from peft import inject_adapter_in_model

    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are wanted
        inject_adapter_in_model(config, unet, adapter_name=name)
    unet.requires_grad_(False)
    keep_precise(unet)
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


def _require_fitting(unet: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    modules = dict(unet.named_modules())
    for path, value in weights.items():
        target, kind, _ = path.rpartition(".lora_")
        module: Any = modules.get(target)
        if not kind or module is None or not hasattr(module, "in_features"):
            raise BackboneError(
                f"{source} is an adapter for another model, or for one cut behind later taps: "
                f"this U-Net has no linear layer {target or path!r}"
            )
        down = "lora_A" in path
        wants = module.in_features if down else module.out_features
        has = value.shape[1] if down else value.shape[0]
        if wants != has:
            raise BackboneError(
                f"{source} is an adapter for another model: {target} has {wants} "
                f"{'inputs' if down else 'outputs'} here and {has} there"
            )


def _layers(unet: nn.Module) -> Iterator[Any]:
    """Modules that peft put in place of linear layers."""
    return (module for module in unet.modules() if hasattr(module, "lora_A"))
