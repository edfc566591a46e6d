"""Whether the areas of a sample can be meant in its picture, whose header tells its size."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

from diffenc.grounding.areas import Area, Box, outline_box
from diffenc.grounding.samples import GroundedImage

_SLACK = 2.0
"""Pixels by which an area may stick out of its picture, whatever its size."""
_LEAST_INSIDE = 0.5
"""Share of a box that must lie in the picture where it sticks out by more."""
_TURNED = (5, 6, 7, 8)
"""Orientations of EXIF that swap height and width."""


class Misfit(NamedTuple):
    """Why a sample cannot be meant in its picture.

    Attributes:
        kind: What is wrong, as it reads behind a number of samples, see `Fault`.
        detail: What is wrong with this one.
    """

    kind: str
    detail: str


def picture_size(path: Path) -> tuple[int, int] | None:
    """(height, width) of the upright picture, by its header; None if that cannot be read.

    Nothing is decoded. An orientation that a PNG file has behind its pixels is not seen.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            # The method of PNG files would decode the picture to look behind its pixels.
            turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # whoever decodes it says why
        return None
    return (width, height) if turn in _TURNED else (height, width)


def find_misfit(sample: GroundedImage, size: tuple[int, int] | None) -> Misfit | None:
    """Why the areas of a sample cannot be meant in its picture; None where they can.

    Published boxes stick out of their pictures by a pixel or a little: an edge may do so by two
    pixels, and by more where half of the box or more lies inside; the rest is cut off by `covered`.
    What lies outside as a whole, or mostly, was measured in another picture or another unit. So was
    a box that lies in the first pixel: its edges are shares of the picture's sides.

    Args:
        sample: The sample.
        size: (height, width) of its upright picture; None takes the size in the annotations, if
            there is one.
    """
    annotated = sample.size
    if size is not None and annotated not in (None, size):
        assert annotated is not None
        return Misfit(
            "with pictures of another size than their annotations say",
            f"the picture has {size[0]} x {size[1]} pixels, and its areas are measured in "
            f"{annotated[0]} x {annotated[1]}: it is another copy of the picture, or was turned",
        )
    size = size or annotated
    if size is None:
        return None
    return next((misfit for area in _areas(sample) if (misfit := _misfit(area, size))), None)


def _areas(sample: GroundedImage) -> Iterator[Area]:
    for text in sample.texts:
        for phrase in text.phrases:
            yield from phrase.areas


def _misfit(area: Area, size: tuple[int, int]) -> Misfit | None:
    height, width = size
    if area.runs is not None and area.runs.size != size:
        rows, columns = area.runs.size
        return Misfit(
            "with masks of another size than their picture",
            f"a mask has {rows} x {columns} pixels and its picture {height} x {width}; both must "
            "be of one size",
        )
    outlines = [outline_box(area.polygons, None)] if area.polygons else []
    for box in (area.box, *outlines):
        if not _is_inside(box, size) or not _is_seen(area.box, size):
            return Misfit(
                "with areas outside of their picture",
                f"{_shown(box)} lies mostly outside of the picture of {height} x {width} pixels",
            )
        if max(size) > 1 and max(map(abs, box)) <= 1:
            return Misfit(
                "with areas within the first pixel",
                f"{_shown(box)} lies within the first pixel of a picture of {height} x {width}: "
                "edges must be in pixels, not shares of the sides",
            )
    return None


def _is_seen(box: Box, size: tuple[int, int]) -> bool:
    """Whether any of a box lies in the picture."""
    (left, top, right, bottom), (height, width) = box, size
    return left < min(right, width) and top < min(bottom, height) and right > 0 and bottom > 0


def _is_inside(box: Box, size: tuple[int, int]) -> bool:
    """Whether a box sticks out by two pixels or less, or has half of itself inside."""
    (left, top, right, bottom), (height, width) = box, size
    if max(-left, -top, right - width, bottom - height) <= _SLACK:
        return True
    across = max(0.0, min(right, width) - max(left, 0))
    down = max(0.0, min(bottom, height) - max(top, 0))
    return across * down >= _LEAST_INSIDE * (right - left) * (bottom - top)


def _shown(box: Box) -> str:
    return f"the box [{', '.join(f'{edge:g}' for edge in box)}]"
