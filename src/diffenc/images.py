"""Pictures of any kind to `pixel_values`: (b 3 height width), RGB, float32, in [-1, 1]."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from diffenc._typing import Resize
from diffenc.errors import ImageError, ShapeError

ImageSource: TypeAlias = "Image.Image | str | os.PathLike[str] | np.ndarray | Tensor"
Images: TypeAlias = "ImageSource | Sequence[ImageSource]"

_TOLERANCE = 1e-3


def as_list(images: Images) -> list[ImageSource]:
    """One picture, a batch as array or tensor, or a sequence of pictures, as a list of pictures.

    Raises:
        ShapeError: There is no picture at all.
        ImageError: Something that is neither a picture nor a sequence of them.
    """
    if isinstance(images, (Image.Image, str, os.PathLike)):
        return [images]
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else [images]
    if not isinstance(images, Iterable):
        raise ImageError(
            "images must be PIL images, paths, arrays, tensors or a list of them, "
            f"got {type(images).__name__}"
        )
    pictures = list(images)
    if not pictures:
        raise ShapeError("got no images; pass at least one")
    return [picture for entry in pictures for picture in as_list_entry(entry)]


def as_list_entry(entry: ImageSource) -> list[ImageSource]:
    """An entry of a sequence: a picture, or a batch of exactly one."""
    if isinstance(entry, (np.ndarray, Tensor)) and entry.ndim == 4:
        if len(entry) != 1:
            raise ShapeError(
                f"a list of images holds single images, got a batch of {len(entry)}; "
                "pass the batch itself, or split it"
            )
        return [entry[0]]
    return [entry]


def to_pixel_values(
    images: Images,
    *,
    size: int | tuple[int, int] | None,
    resize: Resize = "squash",
    multiple: int = 8,
) -> Float[Tensor, "b 3 height width"]:
    """Read, orient, convert and resize pictures into one batch.

    Args:
        images: A PIL image of any mode (palette, RGBA, grey, 16 bit; EXIF orientation is applied,
            transparency lies over white), a path to one, an array (height width [channels]) of
            uint8, uint16 or floats in [0, 1], a tensor (3 height width) of floats in [-1, 1] or
            uint8, a batch of either, or a list of these.
        size: (height, width) or the side of a square, in pixels; not read where `resize` is "none".
        resize: See `EncoderConfig.resize`.
        multiple: Both sides of the result are multiples of it; with "none" the picture's last
            rows and columns are repeated to get there.

    Returns:
        float32 on the CPU, or on the device of the tensors given.

    Raises:
        ImageError: A picture cannot be read, has no pixels, or values outside its range.
        ShapeError: No picture, pictures of different sizes with "none", or a size that is no
            multiple of `multiple`.
    """
    pictures = as_list(images)
    if not pictures:
        raise ShapeError("got no images; pass at least one")
    if resize == "none":
        rows = [_pad_to_multiple(_read(picture), multiple) for picture in pictures]
        if len({row.shape for row in rows}) > 1:
            sizes = sorted({tuple(row.shape[1:]) for row in rows})
            raise ShapeError(
                f"images of one batch must have one size with resize='none', got {sizes}; encode "
                "them one by one, or choose resize='squash', 'crop' or 'pad'"
            )
        return torch.stack(rows)
    height, width = check_size(size, multiple)
    return torch.stack([_fit(_read(picture), (height, width), resize) for picture in pictures])


def check_size(size: int | tuple[int, int] | None, multiple: int) -> tuple[int, int]:
    """(height, width) of `size`, both multiples of `multiple`.

    Raises:
        ShapeError: They are not; the message names the nearest sizes that are.
    """
    if size is None:
        raise ShapeError("size is needed unless resize is 'none'")
    height, width = (size, size) if isinstance(size, int) else size
    for side in (height, width):
        if side % multiple or side <= 0:
            low = max(multiple, side // multiple * multiple)
            raise ShapeError(
                f"image sides must be multiples of {multiple} for this model, got "
                f"{height} x {width}; {low} and {low + multiple} are the nearest to {side}"
            )
    return height, width


def load_image(source: "Image.Image | str | os.PathLike[str]") -> Image.Image:
    """An upright RGB picture from a file or a PIL image of any mode.

    Raises:
        ImageError: The file is missing, is no picture, is cut off, or has no pixels.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise ImageError(f"no such image file: {path}")
        try:
            with Image.open(path) as opened:
                opened.load()
                return _to_rgb(opened)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ImageError(f"cannot read the image {path}: {error}") from error
    return _to_rgb(source)


def image_sizes(images: Images) -> list[tuple[int, int]]:
    """(height, width) of pictures as they are before any resizing, in pixels, upright.

    Raises:
        ImageError: A picture cannot be read.
        ShapeError: No picture.
    """
    return [_size(picture) for picture in as_list(images)]


def _size(source: ImageSource) -> tuple[int, int]:
    if isinstance(source, (str, os.PathLike, Image.Image)):
        width, height = load_image(source).size
        return height, width
    _, height, width = _read(source).shape
    return height, width


def _to_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"the image has no pixels: its size is {image.height} x {image.width}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_deep_gray_to_bytes(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over)
    return image.convert("RGB")


def _deep_gray_to_bytes(values: np.ndarray) -> np.ndarray:
    """16-bit and 32-bit grey to bytes: floats lie in [0, 1], integers in [0, 65535]."""
    limit = 1.0 if values.dtype.kind == "f" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > limit:
        raise ImageError(
            f"grey values of this image lie in [{values.min()}, {values.max()}], allowed is "
            f"[0, {limit:g}]; rescale them first"
        )
    return np.round(values.astype(np.float64) * (255 / limit)).astype(np.uint8)


def _read(source: ImageSource) -> Float[Tensor, "3 h w"]:
    if isinstance(source, Tensor):
        return _read_tensor(source)
    if isinstance(source, np.ndarray):
        return _read_array(source)
    if not isinstance(source, (Image.Image, str, os.PathLike)):
        raise ImageError(
            "an image must be a PIL image, a path, an array or a tensor, "
            f"got {type(source).__name__}"
        )
    pixels = torch.from_numpy(np.array(load_image(source)))
    return rearrange(pixels, "h w c -> c h w").float() / 127.5 - 1


def _read_tensor(values: Tensor) -> Float[Tensor, "3 h w"]:
    if values.ndim != 3 or values.shape[0] not in (1, 3) or 0 in values.shape:
        raise ImageError(
            f"an image tensor must be (3, height, width), got {tuple(values.shape)}; "
            "arrays are (height, width, 3)"
        )
    values = values.expand(3, -1, -1)
    if values.dtype == torch.uint8:
        return values.float() / 127.5 - 1
    if not values.is_floating_point():
        raise ImageError(f"an image tensor must be uint8 or float, got {values.dtype}")
    _check_range(values.detach(), -1.0, "an image tensor", "divide by 127.5 and subtract 1")
    return values.float()


def _read_array(values: np.ndarray) -> Float[Tensor, "3 h w"]:
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4) or 0 in values.shape:
        raise ImageError(
            f"an image array must be (height, width[, 1 | 3 | 4]), got {values.shape}; "
            "tensors are (3, height, width)"
        )
    if values.dtype == np.uint8:
        unit = torch.from_numpy(values.astype(np.float32) / 255)
    elif values.dtype == np.uint16:
        unit = torch.from_numpy(values.astype(np.float32) / 65535)
    elif values.dtype.kind == "f":
        unit = torch.from_numpy(values.astype(np.float32))
        _check_range(unit, 0.0, "a float array", "divide by 255")
    else:
        raise ImageError(f"an image array must be uint8, uint16 or float, got {values.dtype}")
    if unit.shape[2] == 4:
        unit = unit[..., :3] * unit[..., 3:] + (1 - unit[..., 3:])
    return rearrange(unit, "h w c -> c h w").expand(3, -1, -1) * 2 - 1


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


def _fit(image: Float[Tensor, "3 h w"], size: tuple[int, int], resize: Resize) -> Tensor:
    height, width = size
    if resize == "squash":
        return _scale(image, size)
    rows, columns = image.shape[1:]
    ratios = (height / rows, width / columns)
    ratio = max(ratios) if resize == "crop" else min(ratios)
    inner = [max(1, round(side * ratio)) for side in (rows, columns)]
    if resize == "crop":
        inner = [max(have, want) for have, want in zip(inner, size, strict=True)]
        scaled = _scale(image, (inner[0], inner[1]))
        top, left = (inner[0] - height) // 2, (inner[1] - width) // 2
        return scaled[:, top : top + height, left : left + width]
    inner = [min(have, want) for have, want in zip(inner, size, strict=True)]
    scaled = _scale(image, (inner[0], inner[1]))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    return F.pad(scaled, (left, width - inner[1] - left, top, height - inner[0] - top), value=0.0)


def _scale(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[1:]) == size:
        return image
    scaled = F.interpolate(image[None], size=size, mode="bicubic", antialias=True)
    return scaled[0].clamp(-1, 1)


def _pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    below, right = (math.ceil(side / multiple) * multiple - side for side in image.shape[1:])
    if not (below or right):
        return image
    return F.pad(image[None], (0, right, 0, below), mode="replicate")[0]
