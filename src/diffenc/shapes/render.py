"""Scenes to pictures and to masks."""

import math

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw

from diffenc.errors import ConfigError
from diffenc.shapes.scenes import Background, Color, Scene, SceneObject, Shape

PALETTE: dict[Color, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 90, 230),
    "yellow": (245, 215, 50),
    "purple": (150, 60, 190),
    "orange": (245, 135, 30),
}
GROUND: dict[Background, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (150, 150, 150),
    "black": (15, 15, 15),
}

_SUPERSAMPLING = 4


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Draw a scene as an RGB picture of `size` x `size` pixels with soft edges.

    Raises:
        ConfigError: `size` is smaller than 8 pixels.
    """
    full = canvas_side(size)
    canvas = Image.new("RGB", (full, full), GROUND[scene.background])
    draw = ImageDraw.Draw(canvas)
    for thing in scene.objects:
        _draw(draw, thing, full, PALETTE[thing.color])
    return canvas.reduce(_SUPERSAMPLING)


def render_array(scene: Scene, size: int = 64) -> UInt8[np.ndarray, "size size 3"]:
    """`render` as an array of bytes, which the caller may change."""
    return np.array(render(scene, size))


def masks(scene: Scene, size: int = 64) -> Bool[np.ndarray, "objects size size"]:
    """Visible pixels of each object: a pixel belongs to the one of which most is seen in it.

    A pixel of which more is background belongs to none.

    Raises:
        ConfigError: `size` is smaller than 8 pixels.
    """
    full = canvas_side(size)
    index = Image.new("L", (full, full), 0)
    draw = ImageDraw.Draw(index)
    for number, thing in enumerate(scene.objects, start=1):
        _draw(draw, thing, full, number)
    owners = np.asarray(index).reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING)
    shares = [(owners == number).mean(axis=(1, 3)) for number in range(len(scene.objects) + 1)]
    winner = np.argmax(shares, axis=0)
    owned: Bool[np.ndarray, "objects size size"]
    owned = winner == np.arange(1, len(scene.objects) + 1)[:, None, None]
    return owned


def canvas_side(size: int) -> int:
    """Side of the canvas on which a picture of `size` x `size` pixels is drawn.

    Raises:
        ConfigError: `size` is smaller than 8 pixels.
    """
    if size < 8:
        raise ConfigError(f"a picture needs at least 8 pixels a side, got {size}")
    return size * _SUPERSAMPLING


def _draw(
    draw: ImageDraw.ImageDraw, thing: SceneObject, full: int, fill: int | tuple[int, int, int]
) -> None:
    x, y, radius = thing.x * full, thing.y * full, thing.radius * full
    if thing.shape == "circle":
        r = radius * 0.9
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    else:
        outline = [(x + radius * u, y + radius * v) for u, v in _OUTLINES[thing.shape]]
        draw.polygon(outline, fill=fill)


def _star_outline() -> list[tuple[float, float]]:
    corners = []
    for step in range(10):
        radius = 1.0 if step % 2 == 0 else 0.42
        angle = math.pi * step / 5
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return corners


_OUTLINES: dict[Shape, list[tuple[float, float]]] = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "star": _star_outline(),
}
