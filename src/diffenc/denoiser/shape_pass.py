"""Passes on the meta device in which the commonest operations are answered by their shapes.

torch derives the shape of a result on the meta device by decomposing the operation in Python, which
makes most of the time of such a pass. Where the operands plainly fit, the shape is known at once.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Operation = Callable[..., Any]
"""A function of torch, or a stand-in for it that returns None where it leaves the answer to it."""


class ShapePass(TorchFunctionMode):
    """Shapes of the results on the meta device, as torch gives them, in a quarter of the time.

    Within the `with` block, operations whose operands do not plainly fit are left to torch, with
    its own errors. The tensors have no values, so it is for modules on the meta device alone.
    """

    def __torch_function__(
        self,
        function: Operation,
        _types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The result of an operation."""
        kwargs = kwargs or {}
        rule = _RULES.get(function)
        result = rule(*args, **kwargs) if rule is not None and _plain(args, kwargs) else None
        return function(*args, **kwargs) if result is None else result


def _plain(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether all tensors are on the meta device and of one floating type."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    dtype = tensors[0].dtype if tensors else torch.long
    return dtype.is_floating_point and all(t.is_meta and t.dtype == dtype for t in tensors)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    fits = input.ndim > 1 and weight.ndim == 2 and input.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _attention(query: Tensor, key: Tensor, value: Tensor, *masks: Any, **options: Any) -> Any:
    masks = (*masks, *options.values())
    same_rows = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    fits = query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
    if not (same_rows and fits) or any(isinstance(mask, Tensor) for mask in masks):
        return None
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    channels = input.shape[1:2]
    fits = input.ndim > 2 and channels[0] % num_groups == 0 and input.numel() > num_groups
    if not fits or any(each is not None and each.shape != channels for each in (weight, bias)):
        return None
    return input.new_empty(input.shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    shape = tuple(normalized_shape)
    fits = 0 < len(shape) <= input.ndim and input.shape[-len(shape) :] == shape and prod(shape) > 0
    if not fits or any(each is not None and each.shape != shape for each in (weight, bias)):
        return None
    return input.new_empty(input.shape)


def _activation(input: Tensor, **_options: Any) -> Tensor:
    return torch.empty_like(input)


def _arithmetic(input: Any, other: Any, **options: Any) -> Tensor | None:
    if options or not isinstance(input, Tensor):
        return None
    fits = other.shape == input.shape if isinstance(other, Tensor) else type(other) in (int, float)
    return torch.empty_like(input) if fits else None


_RULES: dict[Operation, Operation] = {
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.silu: _activation,
    F.gelu: _activation,
    torch.Tensor.add: _arithmetic,
    torch.Tensor.mul: _arithmetic,
    torch.Tensor.div: _arithmetic,
}
