"""Adapters in a U-Net: put in, used one at a time, merged into the weights and taken out again."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffenc.checks.arguments import shown
from diffenc.denoiser.lora.options import LoraOptions
from diffenc.denoiser.transformers import word_for
from diffenc.errors import ConfigError, near_matches
from diffenc.runtime.defaults import torch_defaults
from diffenc.runtime.inference import lasting
from diffenc.runtime.threads import lock_of, without_warnings


@lasting
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
            `diffenc.denoiser.attention.cross_attention_layers`.
        options: Rank, scale, dropout and projections.
        name: Name of the adapter.
        only: Paths of the projections that may be adapted; None is all of them.

    Raises:
        ConfigError: The name is taken or cannot be one, or nothing is left to adapt.
    """
    from peft import LoraConfig

    require_free(unet, name)
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
    inject(unet, config, name, trainable=True)
    set_lora(unet, name)


def lora_names(unet: nn.Module) -> list[str]:
    """Names of the adapters in a U-Net, in the order in which they came."""
    return list(getattr(unet, "peft_config", {}))


@lasting
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


def listed_loras(unet: nn.Module) -> str:
    """Part of a message that says which adapters there are, or how to have one."""
    known = lora_names(unet)
    if not known:
        return "there is none yet: add_lora() makes one, load_lora(folder) reads one"
    return f"known are {known}"


def require_lora(unet: nn.Module, name: str) -> None:
    """Raise a `ConfigError` that lists the adapters unless there is one by that name."""
    known = lora_names(unet)
    if not isinstance(name, str) or name not in known:
        raise ConfigError(
            f"there is no adapter {shown(name)}; {listed_loras(unet)}.{near_matches(name, known)}"
        )


@contextmanager
def lora_disabled(unet: nn.Module) -> Iterator[None]:
    """Run the U-Net as if it had no adapter; other threads wait until the block ends."""
    with lock_of(unet):
        layers = list(_layers(unet))
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, state in zip(layers, before, strict=True):
                layer._disable_adapters = state


@lasting
def merge_lora(unet: nn.Module) -> None:
    """Add the active adapter to the weights, so that it costs nothing; `unmerge_lora` undoes it.

    The weights as they were are kept beside: taking the sum apart again would round in half
    precision. While merged, the adapter gets no gradient.

    Raises:
        ConfigError: Projections are fused, so that what is merged into them is passed by.
    """
    require_separate(unet)
    for layer in _layers(unet):
        if not layer._disable_adapters and not layer.merged:
            plain = layer.get_base_layer().weight.data
            layer.merge(safe_merge=True)  # into a copy
            layer._unmerged_weight = plain


@lasting
def unmerge_lora(unet: nn.Module) -> None:
    """Put the weights back as they were before `merge_lora`.

    Raises:
        ConfigError: Projections were fused since, which hold the adapter.
    """
    if is_merged(unet):
        require_separate(unet)
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


@lasting
def keep_precise(unet: nn.Module) -> None:
    """Bring adapter weights that are in float16 to float32."""
    for name in lora_names(unet):
        for parameter in lora_parameters(unet, name).values():
            if parameter.dtype == torch.float16:
                parameter.data = parameter.data.float()


@lasting
def inject(unet: nn.Module, config: Any, name: str, *, trainable: bool) -> None:
    """Put the layers in; only what required a gradient before, and these if asked, does after."""
    from peft import inject_adapter_in_model

    require_separate(unet)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    # Several adapters are intended.
    with torch_defaults(), without_warnings("Already found a `peft_config`"):
        inject_adapter_in_model(config, unet, adapter_name=name)
    unet.requires_grad_(False)
    unet.train(unet.training)  # new dropout layers begin in training mode
    for parameter in lora_parameters(unet, name).values():
        parameter.data = parameter.data.float()
    for parameter in (*trained, *(lora_parameters(unet, name).values() if trainable else ())):
        parameter.requires_grad_(True)


def require_separate(unet: nn.Module) -> None:
    """Raise a `ConfigError` where projections are fused, so that adapters on them are passed by."""
    processors = (getattr(module, "processor", None) for module in unet.modules())
    if any(type(processor).__name__.startswith("Fused") for processor in processors):
        raise ConfigError(
            f"the projections of this {word_for(unet)} are fused, and an adapter on them has no "
            "effect; call its unfuse_qkv_projections() first, or merge the adapter before they "
            "are fused"
        )


def require_free(unet: nn.Module, name: str) -> None:
    """Raise a `ConfigError` where the name is taken, or cannot be an adapter's."""
    if not isinstance(name, str):
        raise ConfigError(f"an adapter's name must be a text, got {shown(name)}")
    if name in lora_names(unet):
        raise ConfigError(
            f"there is an adapter {name!r} already; {listed_loras(unet)}. Pass another name=, or "
            f"set_lora({name!r}) to use that one"
        )
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"an adapter's name must be letters, digits and underscores, and no attribute of a "
            f"torch module, got {shown(name)}; try {shown(name[:20] + '_adapter')}"
        )


def _layers(unet: nn.Module) -> Iterator[Any]:
    """Modules that peft put in place of linear layers and convolutions."""
    return (module for module in unet.modules() if hasattr(module, "lora_A"))
