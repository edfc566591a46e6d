"""Pictures of any kind to `pixel_values`: (b 3 height width), RGB, float32, in [-1, 1]."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar, get_args

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffenc._typing import Resize
from diffenc.checks.arguments import sides
from diffenc.config import check_choice
from diffenc.errors import DiffencError, ImageError, ShapeError
from diffenc.inputs.pictures.files import FILE_TYPES, FileSource, load_image
from diffenc.inputs.pictures.resizing import Center, fit
from diffenc.inputs.pictures.values import values_of_array, values_of_tensor, warn_of_unit_range

__all__ = [
    "ImageSource",
    "Images",
    "as_list",
    "as_list_entry",
    "broken_images",
    "check_size",
    "decoded",
    "describe_broken",
    "image_sizes",
    "load_image",
    "to_image",
    "to_picture",
    "to_pixel_values",
]

ImageSource: TypeAlias = "FileSource | np.ndarray | Tensor"
Images: TypeAlias = "ImageSource | Sequence[ImageSource]"

_Read = TypeVar("_Read")

_NAMED = 20
_AT_ONCE = 64


def as_list(images: Images) -> list[ImageSource]:
    """Convert a picture, a batch (array or tensor) or a sequence of pictures to a list of pictures.

    Raises:
        ShapeError: There is no picture at all.
        ImageError: Something that is neither a picture nor a sequence of them.
    """
    if isinstance(images, FILE_TYPES):
        return [_kept(images)]
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUS" and images.ndim == 1:
        images = list(images)  # names or pictures, as a table's column has them
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (set, frozenset)):
        raise ImageError("images must be in an order, got a set; pass a list")
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
    return [_kept(entry)]


def _kept(source: Any) -> Any:
    """A picture that can be read more than once: a stream that cannot go back is read now."""
    seekable = getattr(source, "seekable", None)
    if seekable is None or isinstance(source, (Image.Image, np.ndarray, Tensor)):
        return source
    try:
        return source if seekable() else load_image(source)
    except ValueError:  # closed: told where it is read
        return source


def to_pixel_values(
    images: Images,
    *,
    size: int | tuple[int, int] | None,
    resize: Resize = "squash",
    multiple: int = 8,
    center: Center = "torchvision",
) -> Float[Tensor, "b 3 height width"]:
    """Read, orient, convert and resize pictures into one batch.

    Args:
        images: A PIL image of any mode (palette, RGBA, grey, 16 bit; EXIF orientation is applied,
            transparency lies over white), the path, the content or a binary stream of a file, an
            entry of a Hugging Face dataset (`{"bytes": ..., "path": ...}`), an array (height width
            [channels]) of uint8, uint16 over its whole range or floats in [0, 1], a tensor
            (3 height width) of floats in [-1, 1] or uint8, a batch of either, or a list of these.
        size: Size of the result as (height, width) or as the side of a square, in pixels; ignored
            if `resize` is "none".
        resize: How a picture is brought to `size`: "squash", "crop", "pad" or "none", see
            `EncoderConfig.resize`; `diffenc.inputs.pictures.resizing` says how pixels are counted.
        multiple: Number of pixels that both sides of the result are multiples of; with "none" the
            picture's last rows and columns are repeated to get there.
        center: Library whose rounding decides which middle part "crop" keeps if the margin is odd:
            "torchvision" (`CenterCrop`) or "transformers" (its image processors).

    Returns:
        float32 on the CPU, or on the device of the tensors given.

    Warns:
        RangeWarning: Float tensors without a negative value, which look like [0, 1]; once in a
            process.

    Raises:
        ConfigError: A `size` or `resize` that is none.
        ImageError: A picture cannot be read, has no pixels, or values outside its range.
        ShapeError: No picture, pictures of different sizes with "none", or a size that is no
            multiple of `multiple`.
    """
    pictures = as_list(images)
    if not pictures:
        raise ShapeError("got no images; pass at least one")
    check_choice("resize", resize, get_args(Resize))
    if resize != "none":
        size = check_size(size, multiple)
    if resize == "none":
        rows = [_pad_to_multiple(values, multiple) for values in _read_all(pictures)]
        if len({row.shape for row in rows}) > 1:
            sizes = sorted({tuple(row.shape[1:]) for row in rows})
            raise ShapeError(
                f"images of one batch must have one size with resize='none', got {sizes}; encode "
                "them one by one, or choose resize='squash', 'crop' or 'pad'"
            )
    else:
        assert isinstance(size, tuple)
        rows = [fit(values, size, resize, center) for values in _read_all(pictures)]
    warn_of_unit_range(pictures)
    return _stack(rows)


def to_image(pixel_values: Float[Tensor, "3 h w"]) -> Image.Image:
    """Values in [-1, 1] as a picture of 8 bits."""
    levels = ((pixel_values.detach().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(np.ascontiguousarray(rearrange(levels.numpy(), "c h w -> h w c")))


def to_picture(image: Images) -> Image.Image:
    """One picture of any kind, see `to_pixel_values`, as an upright RGB picture of 8 bits.

    Raises:
        ImageError: The picture cannot be read.
        ShapeError: No picture, or several.
    """
    pictures = as_list(image)
    if len(pictures) != 1:
        raise ShapeError(f"one picture is needed, got {len(pictures)}; pass one of them")
    if isinstance(pictures[0], FILE_TYPES):
        return load_image(pictures[0])
    return to_image(to_pixel_values(pictures, size=None, resize="none", multiple=1)[0])


def check_size(size: int | tuple[int, int] | None, multiple: int) -> tuple[int, int]:
    """(height, width) of `size`, both multiples of `multiple`.

    Raises:
        ConfigError: It is neither a positive int nor two of them.
        ShapeError: They are not; the message names the nearest sizes that are.
    """
    if size is None:
        raise ShapeError("size is needed unless resize is 'none'")
    height, width = sides("size", size)
    for side in (height, width):
        if side % multiple:
            low = max(multiple, side // multiple * multiple)
            raise ShapeError(
                f"image sides must be multiples of {multiple} for this model, got "
                f"{height} x {width}; {low} and {low + multiple} are the nearest to {side}"
            )
    return height, width


def decoded(images: Images) -> list[ImageSource]:
    """Pictures whose files are read now, once, for several readers; arrays and tensors as they are.

    Raises:
        ImageError: A file cannot be read.
    """
    return list(_each(as_list(images), _decoded))


def image_sizes(images: Images) -> list[tuple[int, int]]:
    """(height, width) of pictures as they are before any resizing, in pixels, upright.

    Raises:
        ImageError: A picture cannot be read.
        ShapeError: No picture.
    """
    return [_size(picture) for picture in as_list(images)]


def broken_images(
    images: Images,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, str]:
    """Find pictures that cannot be read: the reasons, by index. Each is decoded as a whole.

    Args:
        images: Pictures of any kind.
        workers: Number of threads that decode pictures.
        progress: Function that is called with the number of pictures checked so far and the number
            of all pictures; None reports nothing.

    Raises:
        ShapeError: No picture.
    """
    pictures = as_list(images)
    broken: dict[int, str] = {}
    pool = ThreadPoolExecutor(workers)
    try:
        for start in range(0, len(pictures), _AT_ONCE):
            part = pictures[start : start + _AT_ONCE]
            faults = map(_fault, part) if workers == 1 else pool.map(_fault, part)
            broken |= {start + place: fault for place, fault in enumerate(faults) if fault}
            if progress is not None:
                progress(start + len(part), len(pictures))
    finally:
        pool.shutdown(cancel_futures=True)
    return broken


def describe_broken(faults: Iterable[str], total: int) -> str:
    """One sentence on pictures that cannot be read, the first twenty of them by name."""
    faults = list(faults)
    if len(faults) == total == 1:
        return faults[0]
    more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    return f"{len(faults)} of {total} images cannot be read: {'; '.join(faults[:_NAMED])}{more}"


def _fault(source: ImageSource) -> str:
    """Why a picture cannot be read, or ""."""
    try:
        _read(source)
    except DiffencError as error:
        return str(error)
    return ""


def _size(source: ImageSource) -> tuple[int, int]:
    if isinstance(source, FILE_TYPES):
        width, height = load_image(source).size
        return height, width
    _, height, width = _read(source).shape
    return height, width


def _read_all(pictures: Sequence[ImageSource]) -> Iterable[Float[Tensor, "3 _h _w"]]:
    """Values of pictures, one by one; an error says which of several it is about."""
    return _each(pictures, _read)


def _decoded(source: ImageSource) -> ImageSource:
    return load_image(source) if isinstance(source, FILE_TYPES) else source


def _each(pictures: Sequence[ImageSource], read: Callable[[ImageSource], _Read]) -> Iterator[_Read]:
    for place, picture in enumerate(pictures):
        try:
            yield read(picture)
        except ImageError as error:
            if len(pictures) == 1 or isinstance(picture, (str, Mapping)):
                raise
            raise ImageError(f"image {place} of {len(pictures)}: {error}") from error


def _read(source: ImageSource) -> Float[Tensor, "3 h w"]:
    if isinstance(source, Tensor):
        return values_of_tensor(source)
    if isinstance(source, np.ndarray):
        return values_of_array(source)
    if not isinstance(source, FILE_TYPES):
        raise ImageError(
            "an image must be a PIL image, a path, bytes, a binary file, an array or a tensor, "
            f"got {type(source).__name__}"
        )
    pixels = torch.from_numpy(np.array(load_image(source)))
    return rearrange(pixels, "h w c -> c h w").float() / 127.5 - 1


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """Rows as a batch, on the device of the one accelerator among them."""
    cpu = torch.device("cpu")
    devices = {row.device for row in rows} - {cpu}
    if len(devices) > 1:
        raise ImageError(
            f"the images are on several devices, {sorted(map(str, devices))}; move them to one"
        )
    return torch.stack([row.to(next(iter(devices), cpu)) for row in rows])


def _pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    rows, columns = image.shape[1:]
    below, right = (math.ceil(side / multiple) * multiple - side for side in (rows, columns))
    if not (below or right):
        return image
    limit = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)  # what Pillow reads at most
    if (rows + below) * (columns + right) > limit:
        raise ImageError(
            f"an image of {rows} x {columns} is padded to {rows + below} x {columns + right} by "
            f"resize='none', more than {limit:,.0f} pixels; choose resize='squash', 'crop' or 'pad'"
        )
    return F.pad(image[None], (0, right, 0, below), mode="replicate")[0]
