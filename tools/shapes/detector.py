"""Find the shapes in a picture of the miniature world, from the renderer's truth.

Judges pictures that a model made: every pixel takes the nearest colour of the palette, connected
pixels of one colour are an object, and its shape is the one whose rendered template covers it best.
The palette, the outlines and the radii are the renderer's own; nothing is learnt.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffenc.errors import ImageError
from diffenc.shapes.render import GROUND, PALETTE, render_array
from diffenc.shapes.scenes import RADII, SHAPES, Color, Scene, SceneObject, Shape, Size

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]

_SMALLEST = 0.5
"""An object of this share of the smallest star's area counts; less is a stain."""
_MARGIN = 2
"""Pixels around an object (at 64 pixels a side) in which its soft edge may lie."""


@dataclass(frozen=True, slots=True)
class Detection:
    """One shape found in a picture.

    Attributes:
        shape: The outline that fits best.
        color: The nearest colour of the palette.
        size: "small" or "large", by the radius.
        x: Centre, fraction of the width from the left.
        y: Centre, fraction of the height from the top.
        radius: As in a scene's object, fraction of the side.
        fit: Intersection over union with the rendered shape, 0 to 1; clean renderings reach 0.9.
    """

    shape: Shape
    color: Color
    size: Size
    x: float
    y: float
    radius: float
    fit: float

    @property
    def kind(self) -> tuple[Color, Shape]:
        """Colour and shape, as in a scene's object."""
        return self.color, self.shape


def detect(image: Image.Image | NDArray[np.uint8], *, min_fit: float = 0.6) -> list[Detection]:
    """Find the shapes in a square picture, from the left to the right.

    Args:
        image: A PIL image, or an array (side, side, 3) of bytes.
        min_fit: Objects that no shape fits as well as this are left out.

    Raises:
        ImageError: The picture is not square, has a side below 16 pixels, or is no RGB image.
    """
    pixels = _to_array(image)
    side = len(pixels)
    background = _background(pixels)
    labels = _nearest_color(pixels, background)
    stain = _SMALLEST * _form("star")[0] * (RADII["small"][0] * side) ** 2
    parts = [
        (color, mask)
        for number, color in enumerate(PALETTE)
        for mask in _objects(labels == number)
        if mask.sum() >= stain
    ]
    taken = np.zeros((side, side), dtype=bool)
    for _, mask in parts:
        taken |= mask
    found = []
    for color, mask in parts:
        others = taken & ~mask
        cover = _cover(pixels, background, color, mask) * ~others
        found.append(_fit(cover, others, color))
    return sorted((one for one in found if one.fit >= min_fit), key=lambda one: one.x)


def _to_array(image: Image.Image | NDArray[np.uint8]) -> Floats:
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] != pixels.shape[1]:
        raise ImageError(f"a scene is a square of RGB pixels, got an array of {pixels.shape}")
    if len(pixels) < 16:
        raise ImageError(f"shapes need a side of at least 16 pixels, got {len(pixels)}")
    return pixels.astype(np.float64)


def _background(pixels: Floats) -> Floats:
    """The plain colour that most of the frame of the picture shows."""
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.array(list(GROUND.values()), dtype=np.float64)
    nearest = _distances(frame, ground).argmin(axis=-1)
    chosen: Floats = ground[np.bincount(nearest).argmax()]
    return chosen


def _nearest_color(pixels: Floats, background: Floats) -> NDArray[np.intp]:
    """Index in the palette of the nearest colour to each pixel; one past the last: background."""
    colors = np.array([*PALETTE.values(), background], dtype=np.float64)
    nearest: NDArray[np.intp] = _distances(pixels, colors).argmin(axis=-1)
    return nearest


def _distances(pixels: Floats, colors: Floats) -> Floats:
    distances: Floats = np.linalg.norm(pixels[..., None, :] - colors, axis=-1)
    return distances


def _objects(mask: Mask) -> Iterator[Mask]:
    """Split a mask where it is one pixel thin: rims of other colours vanish, touching tips part."""
    cores = _components(_eroded(mask))
    labels = np.zeros(mask.shape, dtype=np.int64)
    for number, core in enumerate(cores, start=1):
        labels[core] = number
    for _ in range(3):  # cores grow back at one pace, so that each keeps its own edge
        labels = np.where(mask & (labels == 0), _neighbours(labels).max(axis=0), labels)
    for number in range(1, len(cores) + 1):
        yield labels == number


def _neighbours(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The four neighbours of each pixel, zero outside: (4, h, w)."""
    padded = np.pad(values, 1)
    return np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])


def _eroded(mask: Mask) -> Mask:
    """Pixels whose four neighbours belong to the mask too."""
    return mask & _neighbours(mask.astype(np.int64)).all(axis=0)


def _components(mask: Mask) -> list[Mask]:
    """Connected parts (four neighbours), by flooding from each pixel not yet reached."""
    height, width = mask.shape
    waiting = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    parts = []
    while waiting:
        part = np.zeros((height, width), dtype=bool)
        edge = [waiting.pop()]
        while edge:
            y, x = edge.pop()
            part[y, x] = True
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in waiting:
                    waiting.remove(near)
                    edge.append(near)
        parts.append(part)
    return parts


def _cover(pixels: Floats, background: Floats, color: Color, mask: Mask) -> Floats:
    """Share of each pixel that the object covers: where it lies between background and colour."""
    around = mask
    for _ in range(max(1, round(_MARGIN * len(mask) / 64))):
        around = around | _neighbours(around.astype(np.int64)).any(axis=0)
    toward = np.array(PALETTE[color]) - background
    share = (pixels - background) @ toward / (toward @ toward)
    return np.where(around, share.clip(0, 1), 0.0)


def _fit(cover: Floats, hidden: Mask, color: Color) -> Detection:
    """The shape whose template, of like area and equal centre, covers the object best."""
    side = len(cover)
    total = cover.sum()
    centers = (np.arange(side) + 0.5) / side
    x, y = float(cover.sum(axis=0) @ centers / total), float(cover.sum(axis=1) @ centers / total)
    tries = []
    for shape in SHAPES:
        area, drop = _form(shape)
        for scale in (0.93, 1.0, 1.07):
            radius = scale * math.sqrt(total / area) / side
            thing = SceneObject(shape, color, _size(radius), x, y - drop * radius, radius)
            template = _template(thing, side)
            tries += [
                (_overlap(cover, drawn, ~hidden), thing)
                for drawn in (template, _softened(template))  # models draw soft edges
            ]
    fit, best = max(tries, key=lambda one: one[0])
    return Detection(best.shape, color, best.size, best.x, best.y, best.radius, round(fit, 4))


def _overlap(a: Floats, b: Floats, visible: Mask) -> float:
    """Intersection over union of two soft masks."""
    return float(np.minimum(a, b)[visible].sum() / np.maximum(a, b)[visible].sum())


def _template(thing: SceneObject, side: int) -> Floats:
    """The renderer's own soft mask of one object."""
    ground = np.array(GROUND["black"])
    toward = (np.array(PALETTE[thing.color]) - ground).astype(np.float64)
    share = (render_array(Scene((thing,), "black"), side) - ground) @ toward / (toward @ toward)
    template: Floats = share.clip(0, 1)
    return template


def _softened(template: Floats) -> Floats:
    """A template with weights 1, 2, 1 along both axes: edges about a pixel softer."""
    padded = np.pad(template, 1)
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4


def _size(radius: float) -> Size:
    return "small" if radius < (RADII["small"][1] + RADII["large"][0]) / 2 else "large"


@cache
def _form(shape: Shape) -> tuple[float, float]:
    """Area in squared radii, and how far the centroid lies below the centre, in radii."""
    side, radius = 256, 0.4
    template = _template(SceneObject(shape, "red", "large", 0.5, 0.5, radius), side)
    rows, total = (np.arange(side) + 0.5) / side, template.sum()
    centroid = template.sum(axis=1) @ rows / total
    return float(total / (radius * side) ** 2), float((centroid - 0.5) / radius)
