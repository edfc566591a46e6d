"""Crowded scenes: five to nine small shapes that hide parts of each other and share their traits.

In a scene of one to three objects a question says little that the picture does not show; here it
has to say which of many objects is meant.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

from diffenc.errors import ConfigError
from diffenc.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    Color,
    Scene,
    SceneObject,
    Shape,
    Size,
)

COUNTS = (5, 9)
"""Fewest and most objects of a crowded scene."""

CROWD_RADII: dict[Size, tuple[float, float]] = {"small": (0.055, 0.07), "large": (0.095, 0.115)}
"""Range of the radius of each size in a crowded scene, as a fraction of the image's side."""

OVERLAP = 0.3
"""Share of the smaller radius by which two objects of a crowded scene may reach into each other."""

_MARGIN = 0.01
_TRIES = 200


class _HasPlace(Protocol):
    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...
    @property
    def radius(self) -> float: ...


_Placed = TypeVar("_Placed", bound=_HasPlace)


def sample_crowd(
    rng: random.Random,
    *,
    count: int | None = None,
    kinds: Sequence[tuple[Color, Shape]] | None = None,
) -> Scene:
    """Draw a crowded scene; whatever is not given is drawn.

    Half of the drawn objects are distractors: they share the colour or the shape of one that is
    there, so that neither word alone tells them apart.

    Args:
        rng: Random generator of every choice; equal state gives the equal scene.
        count: Number of objects, 5 to 9; None takes the length of `kinds`, or draws it.
        kinds: Colour and shape of each object; None draws them.

    Raises:
        ConfigError: `count` is not 5 to 9, or `kinds` has another length.
    """
    low, high = COUNTS
    if count is None:
        count = rng.randint(low, high) if kinds is None else len(kinds)
    if not low <= count <= high:
        raise ConfigError(f"a crowded scene has {low} to {high} objects, got {count}")
    if kinds is not None and len(kinds) != count:
        raise ConfigError(f"a scene of {count} needs {count} kinds, got {len(kinds)}")
    background = rng.choices(BACKGROUNDS, weights=(3, 1, 1))[0]
    while True:
        drawn = _sample_kinds(rng, count) if kinds is None else list(kinds)
        objects = placed(_draws(rng, [(*kind, rng.choice(SIZES)) for kind in drawn]))
        if objects is not None:
            return Scene(tuple(objects), background)


def sample_crowds(count: int, *, seed: int) -> Iterator[Scene]:
    """Iterate over `count` crowded scenes; scene k depends on the seed and k alone.

    Raises:
        ConfigError: `count` is negative.
    """
    if count < 0:
        raise ConfigError(f"count must be 0 or more, got {count}")
    return (sample_crowd(random.Random(f"crowds/{seed}/{index}")) for index in range(count))


def _sample_kinds(rng: random.Random, count: int) -> list[tuple[Color, Shape]]:
    kinds: list[tuple[Color, Shape]] = []
    for _ in range(count):
        color, shape = rng.choice(COLORS), rng.choice(SHAPES)
        if kinds and rng.random() < 0.5:
            like = rng.choice(kinds)
            color, shape = (like[0], shape) if rng.random() < 0.5 else (color, like[1])
        kinds.append((color, shape))
    return kinds


def _draws(
    rng: random.Random, drawn: Sequence[tuple[Color, Shape, Size]]
) -> Iterator[Callable[[], SceneObject]]:
    for kind in drawn:
        radius = rng.uniform(*CROWD_RADII[kind[-1]])
        yield partial(_at_random, rng, *kind, radius)


def _at_random(
    rng: random.Random, color: Color, shape: Shape, size: Size, radius: float
) -> SceneObject:
    low, high = radius + _MARGIN, 1 - radius - _MARGIN
    return SceneObject(shape, color, size, rng.uniform(low, high), rng.uniform(low, high), radius)


def placed(draws: Iterable[Callable[[], _Placed]]) -> list[_Placed] | None:
    """Objects at places where little of any is hidden, or None where the picture became full.

    Args:
        draws: Per object a function that draws it anew at another place.
    """
    objects: list[_Placed] = []
    for draw in draws:
        for _ in range(_TRIES):
            thing = draw()
            if all(_apart(thing, other) for other in objects):
                objects.append(thing)
                break
        else:
            return None
    return objects


def _apart(a: _HasPlace, b: _HasPlace) -> bool:
    reach = a.radius + b.radius - OVERLAP * min(a.radius, b.radius)
    return math.hypot(a.x - b.x, a.y - b.y) >= reach
