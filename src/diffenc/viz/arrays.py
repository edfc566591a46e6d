"""Common steps of all pictures: arrays from tensors, and sizes."""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
from PIL import Image

from diffenc.checks.arguments import shown, sides
from diffenc.errors import ConfigError, NonFiniteError, ShapeError
from diffenc.inputs.images import Images, to_picture
from diffenc.inputs.pictures.files import is_plain

Resample = Literal["nearest", "bicubic"]

_FILTERS = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}


def to_array(values: Any, axes: str) -> Float64[np.ndarray, "..."]:
    """A tensor of any dtype and device, or an array, as float64.

    Args:
        values: Tensor or array of numbers.
        axes: Names of the axes, such as "h w"; their number is checked.

    Raises:
        ShapeError: No numbers, other axes, or one of length 0.
        NonFiniteError: NaN or infinity.
    """
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ShapeError(f"expected numbers over ({axes}), got {shown(values)}") from None
    if array.ndim != len(axes.split()) or 0 in array.shape:
        raise ShapeError(f"expected values over ({axes}), got shape {array.shape}")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"values over ({axes}) hold NaN or infinity")
    return array


def as_picture(image: Images) -> Image.Image:
    """One picture of any kind as an encoder sees it: upright, in RGB, over white.

    One of PIL that is so already is not copied: maps of many words share it.

    Raises:
        ImageError: The picture cannot be read.
        ShapeError: No picture, or several.
    """
    picture = to_picture(image)
    return image if isinstance(image, Image.Image) and is_plain(image) else picture


def pil_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height), as PIL wants it, of a side or (height, width).

    Raises:
        ConfigError: It is neither, or a side is below 1.
    """
    height, width = sides("size", size)
    return width, height


def pil_filter(resample: Resample) -> Image.Resampling:
    """PIL's filter of that name.

    Raises:
        ConfigError: There is none.
    """
    if resample not in _FILTERS:
        raise ConfigError(f"resample must be one of {list(_FILTERS)}, got {resample!r}")
    return _FILTERS[resample]
