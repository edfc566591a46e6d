"""Sizes and cut-outs of resized pictures, in whole pixels as torchvision and CLIP count them."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffenc._typing import Resize
from diffenc.config import check_choice

Center = Literal["torchvision", "transformers"]
"""Library whose rule places a cut-out that has no exact middle, see `crop_offset`."""

_LARGE = 4


def scaled_size(picture: tuple[int, int], size: tuple[int, int], *, cover: bool) -> tuple[int, int]:
    """(height, width) of a picture that is scaled to cover `size`, or to lie within it.

    One side is that of `size`; the other is cut off to whole pixels, as torchvision's `Resize` and
    `CLIPImageProcessor` do: 480 x 640 at 512 is 512 x 682. No side falls below 1.

    Args:
        picture: Size of the picture before scaling, as (height, width) in pixels.
        size: Size to cover or to stay within, as (height, width) in pixels.
        cover: Whether the scaled picture covers `size`; otherwise it stays within it.
    """
    (rows, columns), (height, width) = picture, size
    if (height * columns >= width * rows) == cover:
        return height, max(1, height * columns // rows)
    return max(1, width * rows // columns), width


def crop_offset(side: int, length: int, center: Center = "torchvision") -> int:
    """Position at which the middle `length` of `side` pixels begins.

    torchvision's `CenterCrop` rounds half of the margin, and to the even number where it lies
    between two; transformers' image processors cut it off. They differ by one pixel where the
    margin leaves 3 when it is divided by 4.
    """
    margin = side - length
    return margin // 2 if center == "transformers" else round(margin / 2)


def placement(
    picture: tuple[int, int],
    size: tuple[int, int],
    resize: Resize,
    center: Center = "torchvision",
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a resized picture lies: its (height, width), and the row and column of its corner.

    The corner is that of the whole scaled picture in the result; it is negative where the picture
    is cut off there.

    Args:
        picture: Size of the picture before scaling, as (height, width) in pixels.
        size: Size of the result, as (height, width) in pixels.
        resize: How the picture is brought to the size, see `fit`; "none" leaves it as it is.
        center: Rounding of odd margins for "crop", see `crop_offset`.
    """
    if resize == "none":
        return picture, (0, 0)
    if resize == "squash":
        return size, (0, 0)
    if resize == "crop":
        inner = scaled_size(picture, size, cover=True)
        top, left = (
            crop_offset(side, length, center) for side, length in zip(inner, size, strict=True)
        )
        return inner, (-top, -left)
    inner = scaled_size(picture, size, cover=False)
    return inner, ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2)


def fit(
    image: Float[Tensor, "3 h w"],
    size: tuple[int, int],
    resize: Resize,
    center: Center = "torchvision",
) -> Float[Tensor, "3 height width"]:
    """Bring a picture to a size.

    Args:
        image: Picture with values in [-1, 1].
        size: Size of the result, as (height, width) in pixels.
        resize: How the picture is brought to the size: "squash" ignores the aspect ratio; "crop"
            covers the size and keeps the middle; "pad" stays within and adds grey, half of it,
            rounded down to whole pixels, above and left.
        center: Rounding of odd margins for "crop", see `crop_offset`.
    """
    check_choice("center", center, get_args(Center))
    picture = (image.shape[1], image.shape[2])
    inner, (top, left) = placement(picture, size, resize, center)
    if resize == "squash":
        return _scale(image, size)
    height, width = size
    if resize == "crop":
        if inner[0] * inner[1] > _LARGE * max(picture[0] * picture[1], height * width):
            return _scale_part(image, inner, (-top, -left), size)
        return _scale(image, inner)[:, -top : height - top, -left : width - left]
    padding = (left, width - inner[1] - left, top, height - inner[0] - top)
    return F.pad(_scale(image, inner), padding, value=0.0)


def _scale(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a whole picture by the bicubic filter with antialiasing."""
    rows, columns = image.shape[1:]
    if (rows, columns) == size:
        return image
    scaled = image[None]
    # Widths are scaled first, which takes much memory for a high picture that becomes wider.
    if rows * size[1] > _LARGE * max(rows * columns, size[0] * size[1]):
        scaled = F.interpolate(scaled, size=(size[0], columns), mode="bicubic", antialias=True)
    scaled = F.interpolate(scaled, size=size, mode="bicubic", antialias=True)
    return scaled[0].clamp(-1, 1)


def _scale_part(
    image: Tensor, inner: tuple[int, int], start: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Part of `_scale` to `inner` from `start` on, computed from only the pixels that it needs.

    For pictures so narrow that all of it would take gigabytes.
    """
    top, rows = _filter(image.shape[1], inner[0], start[0], size[0])
    left, columns = _filter(image.shape[2], inner[1], start[1], size[1])
    part = image[:, top : top + rows.shape[1], left : left + columns.shape[1]]
    rows, columns = rows.to(image), columns.to(image)
    return (rows @ part @ columns.T).clamp(-1, 1)


def _filter(side: int, scaled: int, start: int, count: int) -> tuple[int, Tensor]:
    """First pixel read, and weights (count, pixels read) of the bicubic filter along one axis.

    Source:
        Keys 1981 with a = -0.5, widened where the picture shrinks, as Pillow and torch have it.
    """
    scale = side / scaled
    width = max(scale, 1.0)
    centers = (torch.arange(start, start + count, dtype=torch.float64, device="cpu") + 0.5) * scale
    first = (centers - 2 * width + 0.5).long().clamp(min=0)
    last = (centers + 2 * width + 0.5).long().clamp(max=side)
    low, high = int(first.min()), int(last.max())
    pixels = torch.arange(low, high, dtype=torch.float64, device="cpu")
    x = ((pixels + 0.5 - centers[:, None]) / width).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    weights *= (pixels >= first[:, None]) & (pixels < last[:, None])
    return low, weights / weights.sum(dim=1, keepdim=True)
