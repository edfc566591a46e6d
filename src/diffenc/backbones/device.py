"""Whether a device is there and computes in a dtype, asked before gigabytes are loaded."""

from functools import cache

import torch
from torch.nn import functional as F

from diffenc.errors import ConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_placement(device: str | torch.device, dtype: torch.dtype) -> torch.device:
    """The device, if it is there and convolves, multiplies and normalises in this dtype.

    Raises:
        ConfigError: No such device here, a dtype that no backbone has, or one that the device
            lacks.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {[str(known) for known in DTYPES]}, got {dtype}")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"cannot use device {str(device)!r}: {reason}") from error
    if reason := _missing(str(place), dtype):
        raise ConfigError(
            f"device {str(device)!r} does not compute in {dtype}: {reason}. Load the model with "
            f"dtype={torch.float32}{' or torch.bfloat16' if dtype == torch.float16 else ''}."
        )
    return place


@cache
def _missing(device: str, dtype: torch.dtype) -> str:
    """What went wrong in a small pass of the operations that a backbone is made of, or ""."""
    try:
        with torch.no_grad():
            image = torch.ones(1, 4, 4, 4, device=device, dtype=dtype)
            image = F.conv2d(image, torch.ones(4, 4, 3, 3, device=device, dtype=dtype), padding=1)
            image = F.silu(F.group_norm(image, 2))
            tokens = image.flatten(2)
            F.scaled_dot_product_attention(tokens, tokens, tokens)
            F.linear(F.layer_norm(tokens, (16,)), torch.ones(2, 16, device=device, dtype=dtype))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return str(error).splitlines()[0]
    return ""
