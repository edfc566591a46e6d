"""Work whose results last: done outside of inference mode, whatever the caller is in.

A tensor that is made inside `torch.inference_mode()` can never be saved for a gradient, not even
after the block. So nothing that is kept may be made there: weights, adapters, entries of caches.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

_P = ParamSpec("_P")
_R = TypeVar("_R")


def lasting(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that runs outside of inference mode, so that what it makes can be kept."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):  # it would switch gradients on where they are off
            return function(*args, **kwargs)

    return run


@lasting
def make_plain(module: nn.Module) -> None:
    """Put copies in place of weights and buffers that were made in inference mode."""
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, value in kept.items():
                if value is None or not value.is_inference():
                    continue
                if id(value) not in copies:  # tied weights stay tied
                    copy = value.detach().clone()
                    trained = value.requires_grad
                    is_weight = isinstance(value, nn.Parameter)
                    copies[id(value)] = nn.Parameter(copy, trained) if is_weight else copy
                kept[name] = copies[id(value)]  # type: ignore[assignment]
