"""What must not be in float16: weights that train, and parts and layers that overflow in it."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_OWN_TYPES = {"gemma2": torch.bfloat16}
"""Types of text encoders that overflow in float16, by the `model_type` of their configs."""


def fitting_dtype(config: Any, dtype: torch.dtype) -> torch.dtype:
    """The type that a part is kept in where another is asked for that may overflow.

    A VAE that says so (`force_upcast`, SDXL's) and the deep ones of Sana are kept in float32,
    Gemma 2 in bfloat16, which it was trained in.

    Args:
        config: Config of the part, as a mapping or as transformers has it.
        dtype: Type that is asked for.
    """
    if dtype != torch.float16:
        return dtype
    known: Any = config if isinstance(config, Mapping) else vars(config)
    if known.get("force_upcast") or "encoder_qkv_multiscales" in known:
        return torch.float32
    kind = known.get("model_type") or getattr(config, "model_type", None)
    return _OWN_TYPES.get(str(kind), dtype)


def precise_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Layers that are in float32 where the module is in float16, as transformers says of T5's."""
    names = frozenset(getattr(module, "_keep_in_fp32_modules", None) or ())
    return (layer for path, layer in module.named_modules() if path.rpartition(".")[2] in names)


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in a dtype, except for what overflows in it.

    Args:
        module: Part of a model; it is cast in place.
        dtype: Type that is asked for.
    """
    kind = fitting_dtype(getattr(module, "config", {}), dtype)
    layers = precise_layers(module) if kind == torch.float16 else ()
    before = {weight: weight.data for layer in layers for weight in layer.parameters()}
    module.to(kind)
    for weight, values in before.items():
        weight.data = values.to(weight.device, torch.float32)
    return module


def keep_from_overflow(module: Any) -> None:
    """Bring to another type what was cast to float16 and overflows in it, once and for good."""
    if next(module.parameters()).dtype != torch.float16:
        return
    if (kind := fitting_dtype(module.config, torch.float16)) != torch.float16:
        module.to(kind)
    for layer in precise_layers(module):
        layer.float()


def stored_bytes(module: nn.Module, config: Any, dtype: torch.dtype) -> int:
    """Bytes of a part's weights where a dtype is asked for.

    Args:
        module: The part, in any dtype or on the meta device.
        config: Config of the part, see `fitting_dtype`.
        dtype: Type that is asked for.
    """
    kind = fitting_dtype(config, dtype)
    layers = precise_layers(module) if kind == torch.float16 else ()
    precise = sum(weight.numel() for layer in layers for weight in layer.parameters())
    every = sum(weight.numel() for weight in module.parameters())
    return every * kind.itemsize + precise * (torch.float32.itemsize - kind.itemsize)


def restore_precise(parameters: Mapping[str, nn.Parameter], before: Mapping[str, Tensor]) -> None:
    """Undo a cast to float16, in which trained weights do not survive; a move to a device stays.

    Args:
        parameters: Parameters after the cast, by name.
        before: Values of these parameters before the cast, by name.
    """
    for path, parameter in parameters.items():
        if parameter.dtype == torch.float16:
            gradient, parameter.grad = parameter.grad, None
            parameter.data = before[path].to(parameter.device, torch.float32)
            parameter.grad = None if gradient is None else gradient.to(parameter.data)
