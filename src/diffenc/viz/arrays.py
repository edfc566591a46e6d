"""Common steps of all pictures: arrays from tensors, and sizes."""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
from PIL import Image

from diffenc.errors import ConfigError, NonFiniteError, ShapeError

Resample = Literal["nearest", "bicubic"]

_FILTERS = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}


def to_array(values: Any, axes: str) -> Float64[np.ndarray, "..."]:
    """A tensor of any dtype and device, or an array, as float64.

    Args:
        values: Tensor or array of numbers.
        axes: Names of the axes, such as "h w"; their number is checked.

    Raises:
        ShapeError: Other axes, or one of length 0.
        NonFiniteError: NaN or infinity.
    """
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != len(axes.split()) or 0 in array.shape:
        raise ShapeError(f"expected values over ({axes}), got shape {array.shape}")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"values over ({axes}) hold NaN or infinity")
    return array


def pil_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height), as PIL wants it, of a side or (height, width).

    Raises:
        ConfigError: A side below 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ConfigError(f"a picture needs sides of 1 pixel or more, got {size}")
    return width, height


def pil_filter(resample: Resample) -> Image.Resampling:
    """PIL's filter of that name.

    Raises:
        ConfigError: There is none.
    """
    if resample not in _FILTERS:
        raise ConfigError(f"resample must be one of {list(_FILTERS)}, got {resample!r}")
    return _FILTERS[resample]
