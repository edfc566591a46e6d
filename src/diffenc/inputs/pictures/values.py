"""Pictures in arrays and tensors: which numbers mean which brightness."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diffenc.errors import ImageError, RangeWarning
from diffenc.inputs.pictures.files import UNCLEAR

_TOLERANCE = 1e-3
_warned = False
_RANGE_KNOWN = ContextVar("range known", default=False)


@contextmanager
def range_known() -> Iterator[None]:
    """Say that float tensors lie in [-1, 1], as `Transform` gives them, and need no warning."""
    token = _RANGE_KNOWN.set(True)
    try:
        yield
    finally:
        _RANGE_KNOWN.reset(token)


def values_of_tensor(values: Tensor) -> Float[Tensor, "3 h w"]:
    """A tensor (3 height width) or (1 height width), uint8 or floats in [-1, 1], as float32.

    Raises:
        ImageError: Another shape or type, or values outside the range.
    """
    if values.layout != torch.strided or values.device.type == "meta" or values.is_quantized:
        kind = "meta" if values.device.type == "meta" else values.layout
        raise ImageError(f"an image tensor must hold plain values, got one that is {kind}")
    if values.ndim != 3 or values.shape[0] not in (1, 3) or 0 in values.shape:
        last = values.ndim == 3 and values.shape[2] in (1, 3)
        hint = (
            "channels come last here: pass tensor.permute(2, 0, 1), of a batch permute(0, 3, 1, 2)"
            if last
            else "arrays are (height, width, 3)"
        )
        raise ImageError(
            f"an image tensor must be (3, height, width), got {tuple(values.shape)}; {hint}"
        )
    values = values.expand(3, -1, -1)
    if values.dtype == torch.uint8:
        return values.float() / 127.5 - 1
    if not values.is_floating_point():
        raise ImageError(f"an image tensor must be uint8 or float, got {values.dtype}")
    values = values.float()
    _check_range(values.detach(), -1.0, "an image tensor", "divide by 127.5 and subtract 1")
    return values


def values_of_array(values: np.ndarray) -> Float[Tensor, "3 h w"]:
    """An array (height width [1 | 3 | 4]) of uint8, uint16 or floats in [0, 1], in [-1, 1].

    Raises:
        ImageError: Another shape or type, values outside the range, masked ones, or uint16 that
            may be bytes.
    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ImageError("an image array has masked values; fill them first (array.filled)")
    shape = values.shape
    values = np.asarray(values)
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4) or 0 in values.shape:
        first = values.ndim == 3 and values.shape[0] in (1, 3, 4)
        hint = "; if channels come first, pass np.moveaxis(array, 0, -1)" if first else ""
        raise ImageError(
            f"an image array must be (height, width[, 1 | 3 | 4]), got {shape}; tensors are "
            f"(3, height, width){hint}"
        )
    unit = torch.from_numpy(_to_unit(values))
    if unit.shape[2] == 4:
        unit = unit[..., :3] * unit[..., 3:] + (1 - unit[..., 3:])
    return rearrange(unit, "h w c -> c h w").expand(3, -1, -1) * 2 - 1


def _to_unit(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1], as a new float32 array in the machine's own layout."""
    kind, bits = values.dtype.kind, 8 * values.dtype.itemsize
    if (kind, bits) not in (("u", 8), ("u", 16)) and kind != "f":
        remedy = {"b": "multiply by 255", "u": "values in [0, 255]", "i": "values in [0, 255]"}
        hint = f"; {remedy[kind]}: array.astype(np.uint8)" if kind in remedy else ""
        raise ImageError(
            f"an image array must be uint8, uint16 or float, got {values.dtype.name}{hint}"
        )
    if kind == "u" and bits == 16 and 0 < values.max() <= 255:
        raise ImageError(
            f"values of this uint16 array lie in [{values.min()}, {values.max()}]: {UNCLEAR}"
        )
    with np.errstate(over="ignore"):  # what float32 does not hold becomes infinity, told below
        unit = np.array(values, dtype=np.float32, order="C", copy=True)
    if kind == "f":
        _check_range(torch.from_numpy(unit), 0.0, "a float array", "divide by 255")
        return unit
    unit /= 255 if bits == 8 else 65535
    return unit


def _check_range(values: Tensor, low: float, what: str, remedy: str) -> None:
    if not torch.isfinite(values).all():
        raise ImageError(f"{what} holds NaN or infinity")
    least, most = float(values.min()), float(values.max())
    if least < low - _TOLERANCE or most > 1 + _TOLERANCE:
        raise ImageError(
            f"{what} must lie in [{low}, 1], got [{least:.3g}, {most:.3g}]; "
            + (
                f"values in [0, 255]: {remedy}"
                if most > 1
                else "values in [-1, 1]: add 1 and halve"
            )
        )


def warn_of_unit_range(pictures: Sequence[Any]) -> None:
    """Warn, once in a process, of float tensors that look as if they were in [0, 1].

    They do where none of them has a negative value and one of them shows more than a single
    colour. Pictures that are that bright in [-1, 1] are told by their levels, as long as nothing
    has resized them: k / 127.5 - 1 is an odd number of 255ths.
    """
    global _warned  # noqa: PLW0603  # once in a process is what is wanted
    if _warned or _RANGE_KNOWN.get():
        return
    tensors = [p for p in pictures if isinstance(p, Tensor) and p.is_floating_point()]
    floats = [tensor.detach().float() for tensor in tensors]
    if not floats or any(bool((values < 0).any()) for values in floats):
        return
    if all(bool((values == values.flatten()[0]).all()) for values in floats):
        return
    if all(_is_odd_levels(values) for values in floats):
        return
    warnings.warn(
        "the image tensors have no negative value, so they look like [0, 1], what torchvision's "
        "ToTensor gives; they are read as [-1, 1], pale and without contrast. Pass "
        "images * 2 - 1, or uint8 tensors, numpy arrays or PIL images",
        RangeWarning,
        stacklevel=outside(),
    )
    _warned = True


def _is_odd_levels(values: Tensor) -> bool:
    levels = values * 255
    odd = 2 * torch.floor(levels / 2) + 1
    return bool(((levels - odd).abs() < 1e-2).all())


def outside() -> int:
    """The `stacklevel` at which the caller of diffenc stands."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in ("diffenc", "torch", "jaxtyping"):
            break
        level, frame = level + 1, frame.f_back
    return level
