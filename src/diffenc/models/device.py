"""Whether a device is there and computes in a dtype, asked before gigabytes are loaded."""

from functools import cache
from typing import TypeAlias

import torch
from torch.nn import functional as F

from diffenc.config import check_choice
from diffenc.errors import ConfigError
from diffenc.storage.names import printable
from diffenc.storage.names import reason as reason_of

SHORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Floating point types that models are loaded in, by their short names."""

DTYPES = tuple(SHORT_DTYPES.values())

DTYPE_NAMES = {str(kind).removeprefix("torch."): kind for kind in DTYPES} | SHORT_DTYPES
"""The same by all names that are taken: "float16" and "fp16"."""

Device: TypeAlias = "str | int | torch.device | None"
Dtype: TypeAlias = "torch.dtype | str | None"


def check_placement(device: Device, dtype: Dtype) -> torch.device:
    """The device, if it is there and convolves, multiplies and normalises in this dtype.

    Args:
        device: Name, number of an accelerator, or `torch.device`; None is the CPU.
        dtype: One of `DTYPES` or its name; None is float32.

    Raises:
        ConfigError: No such device here, a dtype that no backbone has, or one that the device
            lacks.
    """
    kind = as_dtype(dtype)
    place = torch.device("cpu") if device is None else _as_device(device)
    if reason := _missing(str(place), kind):
        raise ConfigError(
            f"device {str(place)!r} does not compute in {kind}: {reason}. Load the model with "
            f"dtype={torch.float32}{' or torch.bfloat16' if kind == torch.float16 else ''}."
        )
    return place


def as_dtype(dtype: Dtype) -> torch.dtype:
    """A floating point type that backbones have, by itself or by name; None is float32.

    Raises:
        ConfigError: Another one.
    """
    if dtype is None:
        return torch.float32
    if isinstance(dtype, str) and (name := dtype.removeprefix("torch.")) in DTYPE_NAMES:
        return DTYPE_NAMES[name]
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ConfigError(
            f"dtype must be one of {[str(known) for known in DTYPES]}, or its name, one of "
            f"{', '.join(DTYPE_NAMES)}; got "
            f"{dtype if isinstance(dtype, torch.dtype) else printable(repr(dtype))}"
        )
    return dtype


def named_device(name: str) -> torch.device:
    """The device of a name, "auto" being CUDA where there is one.

    Raises:
        ConfigError: No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return check_placement(name, torch.float32)


def named_dtype(name: str) -> torch.dtype:
    """The floating point type of one of `DTYPE_NAMES`.

    Raises:
        ConfigError: There is none.
    """
    check_choice("dtype", name, list(DTYPE_NAMES))
    return DTYPE_NAMES[name]


def _as_device(device: "str | int | torch.device") -> torch.device:
    shown = printable(repr(str(device) if isinstance(device, torch.device) else device))
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise ConfigError(
            f"device must be a name such as 'cpu' or 'cuda:0', a number or a torch.device, got "
            f"{shown}"
        )
    try:
        place = torch.device(device)
        torch.empty(1, dtype=torch.float32, device=place)
    except Exception as error:  # of many kinds: each backend has its own
        raise ConfigError(
            f"cannot use device {shown}: {printable(reason_of(error).partition('. ')[0])}. This "
            f"build of torch has on this machine: {', '.join(_devices())}; pass one of them"
        ) from error
    if place.type == "meta":
        raise ConfigError(
            "cannot use device 'meta': it holds no values; diffenc.list_taps tells shapes without "
            "weights"
        )
    return place


def _devices() -> list[str]:
    """Names of the devices that there are, of the kinds that diffenc is used with."""
    graphics = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu", *graphics, *(["mps"] if torch.backends.mps.is_available() else [])]


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
