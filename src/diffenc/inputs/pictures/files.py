"""The one place that opens pictures: every source becomes an upright RGB image of 8 bits."""

import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from diffenc.errors import ImageError
from diffenc.storage.names import exists, expanded, is_file, is_folder, printable, reason

PICTURE_BYTES = 2**31
"""Largest size, in bytes, of a picture that has to be read as a whole."""

_BYTES = 255
_DEEP = 65535
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/|data:", re.IGNORECASE)  # two letters: C:/ is a drive
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURN_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Entries of an image's `info` in which Pillow looks for an orientation."""


@runtime_checkable
class Readable(Protocol):
    """A file or stream, opened for reading bytes."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes, or all that are left."""
        ...


FileSource: TypeAlias = (
    "Image.Image | str | os.PathLike[str] | bytes | bytearray | memoryview | Readable"
    " | Mapping[str, Any]"
)
"""A picture in a file: PIL image, path, content, stream, or `{"bytes": ..., "path": ...}`."""

FILE_TYPES = (Image.Image, str, os.PathLike, bytes, bytearray, memoryview, Mapping, Readable)
"""Types of a `FileSource`, for `isinstance`."""


def load_image(source: FileSource, *, name: str | None = None) -> Image.Image:
    """An upright RGB picture, decoded as a whole.

    Of an animation the first frame is taken, or the one that a PIL image stands at. EXIF
    orientation is applied, transparency lies over white, colour profiles are not applied.

    Args:
        source: A PIL image of any mode, a path ("~" is the home folder), a file's content, a binary
            stream, or an entry of a Hugging Face dataset, `{"bytes": ..., "path": ...}`.
        name: Name of the picture in messages; None takes its path.

    Raises:
        ImageError: The file is missing, is no picture, is cut off, has no pixels or more than
            Pillow allows, or holds grey values whose range is unclear.
    """
    name = name or _name_of(source)
    try:
        with _opened(source) as image:
            return _to_rgb(image)
    except _NameError as error:
        raise ImageError(str(error)) from error.__cause__
    except Exception as error:  # Pillow and its codecs raise errors of twenty kinds
        where = f" {printable(name)}" if name else ""
        raise ImageError(f"cannot read the image{where}: {_in_words(error)}") from error


def load_numbers(path: "str | os.PathLike[str]") -> np.ndarray:
    """The whole numbers of a grey picture as they stand in the file, such as a depth map's.

    Args:
        path: File of one channel, of 8, 16 or 32 bits.

    Returns:
        Array (height, width) of integers, upright as EXIF says.

    Raises:
        ImageError: The file is missing, is no picture, or has colours.
    """
    try:
        with _opened(path) as image:
            image.load()
            if not (image.mode == "L" or image.mode.startswith("I")):
                raise ValueError(f"it must have one channel of whole numbers, got {image.mode!r}")
            return np.asarray(_upright(image))
    except _NameError as error:
        raise ImageError(str(error)) from error.__cause__
    except Exception as error:  # Pillow and its codecs raise errors of twenty kinds
        message = f"cannot read the depth map {printable(path)}: {_in_words(error)}"
        raise ImageError(message) from error


def read_picture(path: "str | os.PathLike[str]") -> bytes:
    """The content of a picture file.

    Raises:
        ImageError: It is no regular file, or cannot be read.
    """
    try:
        place = find_file(path)
        with place.open("rb") as file:
            content = file.read(PICTURE_BYTES + 1)
    except _NameError as error:
        raise ImageError(str(error)) from None
    except (OSError, ValueError, MemoryError) as error:
        raise ImageError(f"cannot read the image {printable(path)}: {reason(error)}") from error
    if len(content) > PICTURE_BYTES:
        raise ImageError(
            f"cannot read the image {printable(path)}: it is larger than {PICTURE_BYTES:,} bytes"
        )
    return content


class _NameError(Exception):
    """A name leads to no file; the message is complete as it stands."""


def find_file(source: "str | os.PathLike[str]") -> Path:
    """The regular file of that name."""
    text = os.fspath(source)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    path = Path(text)
    if is_file(path):
        return path
    if text.startswith("~"):
        path = expanded(path)
        if is_file(path):
            return path
    shown = printable(path)
    if _URL.match(text):
        raise _NameError(
            f"{printable(text)} is a URL, and nothing is downloaded; save the picture and pass its "
            "path, or pass its bytes"
        )
    if is_folder(path):
        raise _NameError(f"no such image file: {shown} is a folder")
    if exists(path):
        raise _NameError(f"no such image file: {shown} is no regular file")
    raise _NameError(f"no such image file: {shown}")


def _name_of(source: Any) -> str | None:
    """Name of a picture in messages, None if it has none."""
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    if isinstance(source, Mapping):
        source = source.get("path")
    else:
        source = getattr(source, "filename", None) or getattr(source, "name", None)
    return source if isinstance(source, str) and source else None


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """Open a source with Pillow; a PIL image is left open."""
    if isinstance(source, Image.Image):
        yield source
        return
    if isinstance(source, Mapping):
        if source.get("bytes") is None and source.get("path") is None:
            raise TypeError(
                'a mapping must hold the picture under "bytes" or its file under "path", got '
                f"{printable(sorted(map(str, source)))}"
            )
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, (str, os.PathLike)):
        with find_file(source).open("rb") as file, _decoder(file) as image:
            yield image
    elif isinstance(source, (bytes, bytearray, memoryview)):
        with _decoder(io.BytesIO(source)) as image:
            yield image
    elif isinstance(source, Readable):
        with _rewound(source) as file, _decoder(file) as image:
            yield image
    else:
        raise TypeError(
            "an image must be a PIL image, a path, bytes, a binary file, an array or a tensor, got "
            f"{type(source).__name__}"
        )


@contextmanager
def _rewound(stream: Any) -> Iterator[Any]:
    """A stream at its beginning, which is put back where it stood."""
    if isinstance(stream, io.TextIOBase):
        raise TypeError('the file is opened as text; open it with mode "rb"')
    try:
        place = stream.tell()
        stream.seek(0)
    except (AttributeError, OSError):  # a pipe, a download
        content = stream.read(PICTURE_BYTES + 1)
        if len(content) > PICTURE_BYTES:
            raise ValueError(f"it is larger than {PICTURE_BYTES:,} bytes") from None
        yield io.BytesIO(content)
        return
    try:
        yield stream
    finally:
        with suppress(OSError, ValueError):
            stream.seek(place)


@contextmanager
def _decoder(file: Any) -> Iterator[Image.Image]:
    try:
        opened = Image.open(file)
    except UnidentifiedImageError as error:
        file.seek(0)
        raise ValueError(_what_it_is(file.read(1024))) from error
    with opened:
        yield opened


def _what_it_is(start: bytes) -> str:
    """Why a file that begins like this is no picture."""
    if not start:
        return "it is empty"
    text = start.lower()
    if b"<svg" in text:
        return "it is an SVG drawing, which has no pixels; convert it to PNG"
    if b"<html" in text or b"<!doctype html" in text:
        return "it holds a web page (HTML) instead of a picture"
    return "it is no picture, or of an unknown format"


def _in_words(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return printable(reason(error), 400)


def _to_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"it has no pixels: its size is {image.height} x {image.width}")
    image.load()
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_deep_gray_to_bytes(image)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF says; EXIF that cannot be read is ignored.

    What is turned says so no more: it may be read again.
    """
    turn = _turn(image)
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in _TURN_KEYS:
        turned.info.pop(key, None)
    return turned


def is_plain(image: Image.Image) -> bool:
    """Whether an image is as `load_image` gives it: upright, in RGB, without transparency."""
    return image.mode == "RGB" and not image.has_transparency_data and _turn(image) is None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How an image is to be turned by its EXIF."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's readers of EXIF and XMP raise what they like
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _deep_gray_to_bytes(image: Image.Image) -> np.ndarray:
    """16-bit and 32-bit grey to bytes: floats lie in [0, 1], integers in [0, 65535]."""
    values = np.asarray(image)
    limit = 1.0 if values.dtype.kind == "f" else float(_DEEP)
    least, most = values.min(), values.max()
    if not np.isfinite(values).all() or least < 0 or most > limit:
        raise ValueError(
            f"its grey values lie in [{least}, {most}], allowed is [0, {limit:g}]; "
            "rescale them first"
        )
    if limit == _DEEP and 0 < most <= _BYTES:
        raise ValueError(
            f"its grey values, of mode {image.mode!r}, lie in [{least}, {most}]: {UNCLEAR}"
        )
    gray = np.round(values.astype(np.float64) * (255 / limit)).astype(np.uint8)
    hidden = image.info.get("transparency")
    if isinstance(hidden, (int, float)):
        gray[values == hidden] = 255
    return gray


UNCLEAR = (
    "bytes, or 16 bits that are nearly black; convert bytes to uint8, and divide 16 bits by 65535 "
    "to floats"
)
"""Message about integers of 16 bits and more whose values would fit in bytes."""
