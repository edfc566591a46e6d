"""Areas of a picture, and how much of each cell they cover once the picture is resized."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw
from torch import Tensor

from diffenc._typing import Resize
from diffenc.checks.arguments import number, shown, whole
from diffenc.errors import ConfigError
from diffenc.inputs.pictures.resizing import placement

Box: TypeAlias = tuple[float, float, float, float]
"""Left, upper, right and lower edge in pixels of the upright picture."""

_MOST_PIXELS = 2**28
_FINER = 4
"""Outlines are drawn so many times finer than pixels, for their edges to count by half."""


@dataclass(frozen=True, slots=True)
class RunLengths:
    """A mask as numbers of pixels, columns first: outside, inside, outside and so on.

    Attributes:
        size: (height, width) of the mask.
        counts: Lengths of the runs, the first of which is outside.
    """

    size: tuple[int, int]
    counts: tuple[int, ...]

    def mask(self) -> Bool[np.ndarray, "h w"]:
        """The pixels that are inside."""
        inside = np.arange(len(self.counts)) % 2 == 1
        height, width = self.size
        pixels: np.ndarray = np.repeat(inside, self.counts).reshape(width, height).T
        return pixels


@dataclass(frozen=True, slots=True)
class Area:
    """One thing in a picture: its box and, where it is known, its outline.

    Attributes:
        box: Edges of the box.
        polygons: Outlines of its visible parts: x and y of each corner, in turn, in pixels.
        runs: Mask of the picture; None where there is none.
    """

    box: Box
    polygons: tuple[tuple[float, ...], ...] = ()
    runs: RunLengths | None = None

    @property
    def is_empty(self) -> bool:
        """Whether its box has no extent: published files hold a few."""
        left, top, right, bottom = self.box
        return not (left < right and top < bottom)


def covered(
    areas: Iterable[Area],
    picture: tuple[int, int],
    result: tuple[int, int],
    *,
    resize: Resize,
    cell: int,
    masks: bool = True,
) -> Float[Tensor, "h w"]:
    """Share of each cell that some areas cover together, from 0 to 1, after a picture's resizing.

    What several areas cover counts once. Of boxes alone the share is exact; outlines are drawn on a
    grid. What lies outside of the picture is left out.

    Args:
        areas: Areas in pixels of the picture.
        picture: (height, width) of the upright picture.
        result: (height, width) of its pixel values.
        resize: How the picture is brought there, see `EncoderConfig.resize`.
        cell: Side of a cell in pixels of the result.
        masks: Whether outlines are taken where there are some; otherwise boxes.
    """
    (inner, corner), grid = placement(picture, result, resize), tuple(s // cell for s in result)
    factors = tuple(side / before for side, before in zip(inner, picture, strict=True))
    boxes: list[Box] = []
    outlined: np.ndarray | None = None
    for area in areas:
        pixels = None
        if masks:
            pixels = _outline(area, picture, result, inner, factors, corner)
        if pixels is not None:
            rows, columns = (count * cell * _FINER for count in grid)
            pixels = pixels[:rows, :columns]
        if pixels is None or not pixels.any():  # thinner than a pixel
            boxes.append(_clamped(area.box, picture))
        else:
            outlined = pixels if outlined is None else outlined | pixels
    share = _covered_by_boxes(boxes, grid, factors, corner, cell)
    if outlined is not None:
        of_outlines = _means(outlined, grid)
        if ((share > 0) & (of_outlines > 0)).any():
            fine = _covered_by_boxes(boxes, outlined.shape, factors, corner, 1 / _FINER)
            share = _means(np.where(outlined, np.float32(1), fine), grid)
        else:
            share = share + of_outlines
    return torch.from_numpy(share.clip(max=1))


def _clamped(box: Box, picture: tuple[int, int]) -> Box:
    left, top, right, bottom = box
    height, width = picture
    return max(left, 0), max(top, 0), min(right, width), min(bottom, height)


def _covered_by_boxes(
    boxes: Sequence[Box],
    grid: Sequence[int],
    factors: Sequence[float],
    corner: Sequence[int],
    cell: float,
) -> Float[np.ndarray, "h w"]:
    """Share of each cell that lies in one box or more.

    The edges of all boxes cut the picture into rectangles, each of which lies in a box as a whole
    or not at all. A cell's share of a rectangle is a product of two lengths.
    """
    boxes = [box for box in boxes if box[0] < box[2] and box[1] < box[3]]
    if not boxes:
        return np.zeros(tuple(grid), dtype=np.float32)
    sides, places = [], []
    for axis, (count, factor, start) in enumerate(zip(grid, factors, corner, strict=True)):
        spans = [(box[1 - axis], box[3 - axis]) for box in boxes]
        lines = sorted({edge for span in spans for edge in span})
        index = {edge: place for place, edge in enumerate(lines)}
        places.append([slice(index[low], index[high]) for low, high in spans])
        edges = [(edge * factor + start) / cell for edge in lines]
        cells = np.arange(count)[:, None]
        low, high = np.array(edges[:-1]), np.array(edges[1:])
        sides.append((np.minimum(cells + 1, high) - np.maximum(cells, low)).clip(0, 1))
    inside = np.zeros((sides[0].shape[1], sides[1].shape[1]))
    for part in zip(*places, strict=True):
        inside[part] = 1
    share: np.ndarray = sides[0] @ inside @ sides[1].T
    return share.astype(np.float32)


def _means(pixels: np.ndarray, grid: Sequence[int]) -> Float[np.ndarray, "h w"]:
    """Mean of the pixels of each cell."""
    rows, columns = grid
    height, width = pixels.shape
    cells = pixels.reshape(rows, height // rows, columns, width // columns)
    share: np.ndarray = cells.mean(axis=(1, 3), dtype=np.float32)
    return share


def _outline(
    area: Area,
    picture: tuple[int, int],
    result: tuple[int, int],
    inner: tuple[int, int],
    factors: Sequence[float],
    corner: Sequence[int],
) -> "Bool[np.ndarray, 'h w'] | None":
    """An outline drawn `_FINER` times finer than the result; None where there is none."""
    if area.polygons:
        (height, width), (across_y, across_x), (top, left) = result, factors, corner
        canvas = Image.new("1", (width * _FINER, height * _FINER))
        draw = ImageDraw.Draw(canvas)
        for polygon in area.polygons:
            # A corner at 0 is the outer edge of the first pixel, whose middle Pillow calls 0.
            points = [
                ((x * across_x + left) * _FINER - 0.5, (y * across_y + top) * _FINER - 0.5)
                for x, y in zip(polygon[::2], polygon[1::2], strict=True)
            ]
            draw.polygon(points, fill=1)
        pixels = np.array(canvas, dtype=bool)
        box = outline_box(area.polygons, None)
        if box != _clamped(box, picture):  # what sticks out would lie on padding
            rows, columns = (
                slice(max(first, 0) * _FINER, (first + side) * _FINER)
                for first, side in zip(corner, inner, strict=True)
            )
            within = np.zeros_like(pixels)
            within[rows, columns] = pixels[rows, columns]
            pixels = within
        return pixels
    if area.runs is None:
        return None
    pixels = area.runs.mask()
    for axis in (0, 1):
        middles = (np.arange(result[axis] * _FINER) + 0.5) / _FINER - corner[axis]
        nearest = np.floor(middles * pixels.shape[axis] / inner[axis]).astype(np.int64)
        there = (nearest >= 0) & (nearest < pixels.shape[axis])
        pixels = np.take(pixels, nearest.clip(0, pixels.shape[axis] - 1), axis=axis)
        pixels = pixels & (there[:, None] if axis == 0 else there)
    return pixels


def read_box(value: Any, where: str, *, corners: bool) -> Box:
    """A box of four numbers.

    Args:
        value: Value from a file.
        where: Place of the value, for messages.
        corners: Whether the last two numbers are right and lower edge; otherwise width and height,
            as in COCO's layout.

    Raises:
        ConfigError: It is none, or its width or height is negative.
    """
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        form = "[left, top, right, bottom]" if corners else "[left, top, width, height]"
        raise ConfigError(f"{where} must be four numbers {form}, got {shown(value)}")
    first, second, third, fourth = (number(where, each) for each in value)
    if corners:
        return first, second, third, fourth
    if min(third, fourth) < 0:
        raise ConfigError(
            f"{where} must be [left, top, width, height], and {shown(list(value))} has a negative "
            "width or height"
        )
    return first, second, first + third, second + fourth


def read_outline(
    value: Any, where: str
) -> "tuple[tuple[tuple[float, ...], ...], RunLengths | None]":
    """Polygons, or runs, of a segmentation in COCO's layout; neither where there is none.

    Raises:
        ConfigError: It is of no known form.
    """
    if value is None or value == []:
        return (), None
    if isinstance(value, list):
        return tuple(_polygon(each, where) for each in value), None
    if isinstance(value, Mapping) and {"counts", "size"} <= value.keys():
        return (), _run_lengths(value, where)
    raise ConfigError(
        f"{where} must be a list of polygons [x, y, x, y, ...], or runs "
        f'{{"size": [height, width], "counts": ...}}, got {shown(value)}'
    )


def _polygon(value: Any, where: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) < 6 or len(value) % 2:
        raise ConfigError(
            f"a polygon of {where} must be [x, y, x, y, ...] with three corners or more, got "
            f"{shown(value)}"
        )
    return tuple(number(f"a corner of {where}", each) for each in value)


def _run_lengths(value: Mapping[str, Any], where: str) -> RunLengths:
    sides = value["size"]
    if not isinstance(sides, list) or len(sides) != 2:
        raise ConfigError(f"the size of {where} must be [height, width], got {shown(sides)}")
    height, width = (whole(f"a side of {where}", side, least=1, most=2**20) for side in sides)
    if height * width > _MOST_PIXELS:
        raise ConfigError(f"{where} is a mask of {height} x {width}, which is too large")
    runs = value["counts"]
    if isinstance(runs, str):
        counts = _unpacked(runs, where)
    elif isinstance(runs, list):
        counts = tuple(whole(f"a run of {where}", each, least=0) for each in runs)
    else:
        raise ConfigError(f"the counts of {where} must be a list or a text, got {shown(runs)}")
    if min(counts, default=-1) < 0 or sum(counts) != height * width:
        raise ConfigError(
            f"the runs of {where} cover {sum(counts):,} pixels and its mask has {height * width:,}"
        )
    return RunLengths((height, width), counts)


def _unpacked(text: str, where: str) -> tuple[int, ...]:
    """Runs of a text of COCO's: six bits a letter from "0" on, the lowest first.

    A number ends with a letter below 32, whose bit of 16 is its sign; from the fourth run on it is
    the difference to the run before the last one.
    """
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise ConfigError(f"the counts of {where} hold {letter!r}, which stands for no number")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            if shift > 60:
                raise ConfigError(f"the counts of {where} hold a number of more than 60 bits")
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ConfigError(f"the counts of {where} are cut off")
    return tuple(counts)


def area_content(area: Area) -> str:
    """What an area is, as a text."""
    runs = None if area.runs is None else (area.runs.size, area.runs.counts)
    return json.dumps([area.box, area.polygons, runs])


def outline_box(polygons: Sequence[Sequence[float]], runs: RunLengths | None) -> Box:
    """The box around an outline; one without extent where there is none."""
    if runs is not None:
        rows, columns = np.nonzero(runs.mask())
        if not len(rows):
            return 0.0, 0.0, 0.0, 0.0
        return float(columns.min()), float(rows.min()), columns.max() + 1.0, rows.max() + 1.0
    xs, ys = ([x for polygon in polygons for x in polygon[axis::2]] for axis in (0, 1))
    return min(xs), min(ys), max(xs), max(ys)
