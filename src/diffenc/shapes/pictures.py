"""Scenes of little pictures: five to nine things such as a dog, a pizza or a car.

Where shapes share colours and outlines and a question has to say which is meant, each of these has
a word of its own. They are emoji of Noto Emoji, see `diffenc/shapes/art`.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image

from diffenc.errors import ConfigError, near_matches
from diffenc.shapes.crowds import COUNTS, placed
from diffenc.shapes.render import canvas_side
from diffenc.shapes.scenes import Relation, direction

NOUNS = (
    *("dog", "cat", "mouse", "rabbit", "bear", "tiger", "cow", "pig"),
    *("frog", "chicken", "penguin", "owl", "horse", "fish", "octopus", "snail"),
    *("butterfly", "bee", "turtle", "apple", "pear", "lemon", "banana", "watermelon"),
    *("strawberry", "pineapple", "tomato", "carrot", "mushroom", "pizza", "hamburger", "cookie"),
    *("cake", "car", "taxi", "bus", "rocket", "house", "cactus", "rose"),
    *("bell", "key", "book", "guitar", "football", "basketball", "crown", "shoe"),
)
"""Names of the things, in the order in which they lie in the file: eight in a row."""

PICTURE_RADII = (0.1, 0.145)
"""Range of a thing's radius, as a fraction of the image's side."""

GROUNDS = (
    *((250, 250, 250), (150, 150, 150), (15, 15, 15)),
    *((200, 220, 240), (225, 215, 190), (120, 160, 120)),
)
"""Colours of the background (red, green, blue)."""

_ART = Path(__file__).parent / "art" / "pictures.png"
_TILE, _IN_A_ROW = 64, 8
_TWINS = 0.3
"""Share of the scenes in which one thing is there twice."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One little picture.

    Attributes:
        noun: Name of the thing, one of `NOUNS`.
        x: Position of the centre, as a fraction of the picture's width from the left.
        y: Position of the centre, as a fraction of the picture's height from the top.
        radius: Half of the longer side, as a fraction of the picture's side.

    Raises:
        ConfigError: An unknown noun, or a radius that is not above 0.
    """

    noun: str
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        if self.noun not in NOUNS:
            raise ConfigError(
                f"there is no little picture of {self.noun!r}; known are {', '.join(NOUNS)}."
                f"{near_matches(self.noun, NOUNS)}"
            )
        if not (self.radius > 0 and math.isfinite(self.x + self.y + self.radius)):
            raise ConfigError(
                f"a thing needs a finite place and a radius above 0, got x={self.x}, y={self.y}, "
                f"radius={self.radius}; all are fractions of the image's side"
            )


@dataclass(frozen=True, slots=True)
class PictureScene:
    """Little pictures in drawing order (later ones lie in front) on a plain background.

    Attributes:
        objects: The things.
        ground: Colour of the background (red, green, blue), 0 to 255.
    """

    objects: tuple[Thing, ...]
    ground: tuple[int, int, int] = GROUNDS[0]

    def relation(self, first: int, second: int) -> Relation | None:
        """Relation of object `first` to object `second`, or None if no single word is right."""
        a, b = self.objects[first], self.objects[second]
        return direction(a.x - b.x, a.y - b.y)

    def named(self, noun: str) -> tuple[int, ...]:
        """Indices of the things of that name."""
        return tuple(index for index, thing in enumerate(self.objects) if thing.noun == noun)


def sample_pictures(
    rng: random.Random, *, count: int | None = None, nouns: Sequence[str] | None = None
) -> PictureScene:
    """Draw a scene of little pictures; whatever is not given is drawn.

    Args:
        rng: Random generator of every choice; equal state gives the equal scene.
        count: Number of things, 5 to 9; None takes the length of `nouns`, or draws it.
        nouns: Name of each thing; None draws different ones, of which in three of ten scenes one
            is there twice.

    Raises:
        ConfigError: `count` is not 5 to 9, `nouns` has another length, or a noun is unknown.
    """
    low, high = COUNTS
    if count is None:
        count = rng.randint(low, high) if nouns is None else len(nouns)
    if not low <= count <= high:
        raise ConfigError(f"a scene of little pictures has {low} to {high} of them, got {count}")
    if nouns is not None and len(nouns) != count:
        raise ConfigError(f"a scene of {count} needs {count} nouns, got {len(nouns)}")
    ground = rng.choice(GROUNDS)
    while True:
        drawn = list(nouns or rng.sample(NOUNS, count))
        if nouns is None and rng.random() < _TWINS:
            drawn[-1] = drawn[0]
        objects = placed(partial(_at_random, rng, noun) for noun in drawn)
        if objects is not None:
            return PictureScene(tuple(objects), ground)


def sample_picture_scenes(count: int, *, seed: int) -> Iterator[PictureScene]:
    """Iterate over `count` scenes of little pictures; scene k depends on the seed and k alone.

    Raises:
        ConfigError: `count` is negative.
    """
    if count < 0:
        raise ConfigError(f"count must be 0 or more, got {count}")
    return (sample_pictures(random.Random(f"pictures/{seed}/{index}")) for index in range(count))


def _at_random(rng: random.Random, noun: str) -> Thing:
    radius = rng.uniform(*PICTURE_RADII)
    return Thing(noun, rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius), radius)


def render_pictures(scene: PictureScene, size: int = 96) -> Image.Image:
    """Draw a scene as an RGB picture of `size` x `size` pixels.

    Raises:
        ConfigError: `size` is smaller than 8 pixels.
    """
    canvas_side(size)
    canvas = Image.new("RGB", (size, size), scene.ground)
    for thing in scene.objects:
        tile, corner = _drawn(thing, size)
        canvas.paste(tile, corner, tile)
    return canvas


def picture_masks(scene: PictureScene, size: int = 96) -> Bool[np.ndarray, "objects size size"]:
    """Visible pixels of each thing: a pixel belongs to the last one that covers half of it.

    Raises:
        ConfigError: `size` is smaller than 8 pixels.
    """
    canvas_side(size)
    owner = np.zeros((size, size), int)
    for number, thing in enumerate(scene.objects, start=1):
        tile, corner = _drawn(thing, size)
        cover = Image.new("L", (size, size), 0)
        cover.paste(tile.getchannel("A"), corner)
        owner[np.asarray(cover) > 127] = number
    owned: Bool[np.ndarray, "objects size size"]
    owned = owner == np.arange(1, len(scene.objects) + 1)[:, None, None]
    return owned


def _drawn(thing: Thing, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """A thing's picture as large as it is in a scene, and where its upper left corner lies."""
    tile = _tiles()[thing.noun]
    scale = 2 * thing.radius * size / max(tile.size)
    width, height = (max(1, round(side * scale)) for side in tile.size)
    corner = round(thing.x * size - width / 2), round(thing.y * size - height / 2)
    return tile.resize((width, height), Image.Resampling.LANCZOS), corner


@lru_cache(maxsize=1)
def _tiles() -> dict[str, Image.Image]:
    sheet = Image.open(_ART).convert("RGBA")
    tiles = {}
    for index, noun in enumerate(NOUNS):
        left, top = index % _IN_A_ROW * _TILE, index // _IN_A_ROW * _TILE
        tile = sheet.crop((left, top, left + _TILE, top + _TILE))
        tiles[noun] = tile.crop(tile.getbbox())
    return tiles
