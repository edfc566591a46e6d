"""Weights that train, kept in float32 where a model is cast to float16."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


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
