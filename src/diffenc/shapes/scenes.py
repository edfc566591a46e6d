"""Scenes of one to three coloured shapes on a plain background, and the seeded sampler of them.

A `Scene` is the truth from which pictures, masks, captions, questions and benchmarks are made.
Positions and radii are fractions of the image's side, x to the right and y down, so that a scene
has no resolution of its own.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from diffenc.errors import ConfigError, near_matches

Color = Literal["red", "green", "blue", "yellow", "purple", "orange"]
Shape = Literal["circle", "square", "triangle", "star"]
Size = Literal["small", "large"]
Background = Literal["white", "gray", "black"]
Relation = Literal["left of", "right of", "above", "below"]
Place = Literal["left", "right", "top", "bottom", "middle"]

COLORS: tuple[Color, ...] = get_args(Color)
SHAPES: tuple[Shape, ...] = get_args(Shape)
SIZES: tuple[Size, ...] = get_args(Size)
BACKGROUNDS: tuple[Background, ...] = get_args(Background)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
PLACES: tuple[Place, ...] = get_args(Place)

RADII: dict[Size, tuple[float, float]] = {"small": (0.12, 0.14), "large": (0.19, 0.22)}
"""Range of the radius of each size, as a fraction of the image's side."""

INVERSE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}

_MARGIN = 0.02
_DOMINANCE = 1.5


def _check_word(what: str, word: str, known: Sequence[str]) -> None:
    if word not in known:
        raise ConfigError(
            f"unknown {what} {word!r}; known are {', '.join(known)}.{near_matches(word, known)}"
        )


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One coloured shape.

    Attributes:
        shape: Name of the object's shape.
        color: Fill colour of the object.
        size: Size of the object, "small" or "large": the word for `radius`.
        x: Position of the centre, as a fraction of the picture's width from the left.
        y: Position of the centre, as a fraction of the picture's height from the top.
        radius: Half of the object's extent, as a fraction of the picture's side: the distance of a
            star's points and a triangle's top from the centre. Circles reach 0.9 of it, squares'
            corners 1.13, triangles' 1.24.

    Raises:
        ConfigError: An unknown word, or a radius that is not above 0.
    """

    shape: Shape
    color: Color
    size: Size
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        _check_word("shape", self.shape, SHAPES)
        _check_word("color", self.color, COLORS)
        _check_word("size", self.size, SIZES)
        if not (self.radius > 0 and math.isfinite(self.x + self.y + self.radius)):
            raise ConfigError(
                f"an object needs a finite place and a radius above 0, got x={self.x}, "
                f"y={self.y}, radius={self.radius}; all are fractions of the image's side"
            )

    @property
    def kind(self) -> tuple[Color, Shape]:
        """Colour and shape, as a caption names the object."""
        return self.color, self.shape

    @property
    def place(self) -> Place | None:
        """Place in the picture in one word, or None if no single word is right (a corner)."""
        dx, dy = self.x - 0.5, self.y - 0.5
        if math.hypot(dx, dy) < 0.1:
            return "middle"
        if max(abs(dx), abs(dy)) < 0.17 or not _dominates(dx, dy):
            return None
        if abs(dx) > abs(dy):
            return "left" if dx < 0 else "right"
        return "top" if dy < 0 else "bottom"


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in drawing order (later ones lie in front) on a plain background.

    Raises:
        ConfigError: An unknown background.
    """

    objects: tuple[SceneObject, ...]
    background: Background = "white"

    def __post_init__(self) -> None:
        _check_word("background", self.background, BACKGROUNDS)

    def relation(self, first: int, second: int) -> Relation | None:
        """Relation of object `first` to object `second`, or None if no single word is right."""
        a, b = self.objects[first], self.objects[second]
        return direction(a.x - b.x, a.y - b.y)

    def count(self, *, shape: Shape | None = None, color: Color | None = None) -> int:
        """Number of objects of that shape and colour; None stands for any."""
        return sum(
            shape in (None, thing.shape) and color in (None, thing.color) for thing in self.objects
        )

    def groups(self) -> list[tuple[tuple[Color, Shape], list[int]]]:
        """Indices of the objects of each kind, in order of first appearance."""
        groups: dict[tuple[Color, Shape], list[int]] = {}
        for index, thing in enumerate(self.objects):
            groups.setdefault(thing.kind, []).append(index)
        return list(groups.items())


def direction(dx: float, dy: float) -> Relation | None:
    """Relation of what lies dx to the right and dy below, or None if no single word is right."""
    if not _dominates(dx, dy):
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _dominates(dx: float, dy: float) -> bool:
    larger, smaller = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    return larger > 0 and larger >= _DOMINANCE * smaller


def sample_scene(
    rng: random.Random,
    *,
    count: int | None = None,
    kinds: Sequence[tuple[Color, Shape]] | None = None,
    sizes: Sequence[Size] | None = None,
    relation: Relation | None = None,
    overlap: float = 0.0,
) -> Scene:
    """Draw a scene; whatever is not given is drawn.

    Args:
        rng: Random generator of every choice; equal state gives the equal scene.
        count: Number of objects, 1 to 3; None takes the length of `kinds`, or draws 1, 2 or 3 with
            weights 3, 5, 2.
        kinds: Colour and shape of each object; None draws them. Drawn kinds repeat in a quarter of
            the scenes with more than one object, so that there is something to count; otherwise
            they differ.
        sizes: Size of each object; None draws them.
        relation: Relation of object 0 to object 1, which needs two objects or more; None asks for
            no relation.
        overlap: Share of the smaller radius by which two objects may reach into each other;
            0 keeps them apart, but for corners, which touch in one scene of a hundred.

    Raises:
        ConfigError: `count` is not 1 to 3, or the lengths of `kinds` and `sizes` differ from it,
            or a relation is asked of a single object, or a word is unknown, or `overlap` is not
            0 to 1.
    """
    if count is None:
        count = rng.choices((1, 2, 3), weights=(3, 5, 2))[0] if kinds is None else len(kinds)
    if not 1 <= count <= 3:
        raise ConfigError(f"a scene has 1 to 3 objects, got {count}")
    if not 0 <= overlap <= 1:
        raise ConfigError(f"overlap is a share of a radius, 0 to 1, got {overlap}")
    if relation is not None:
        _check_word("relation", relation, RELATIONS)
        if count < 2:
            raise ConfigError(f"the relation {relation!r} needs two objects, got {count}")
    for name, values in (("kinds", kinds), ("sizes", sizes)):
        if values is not None and len(values) != count:
            raise ConfigError(f"a scene of {count} needs {count} {name}, got {len(values)}")
    for size in sizes or ():
        _check_word("size", size, SIZES)
    if kinds is None:
        kinds = _sample_kinds(rng, count)
    if sizes is None:
        sizes = [rng.choice(SIZES) for _ in range(count)]
    background = rng.choices(BACKGROUNDS, weights=(3, 1, 1))[0]
    while True:
        objects = [
            _sample_object(rng, *kind, size) for kind, size in zip(kinds, sizes, strict=True)
        ]
        scene = Scene(tuple(objects), background)
        if not _fits(objects, overlap):
            continue
        if relation is not None and scene.relation(0, 1) != relation:
            continue
        return scene


def _sample_kinds(rng: random.Random, count: int) -> list[tuple[Color, Shape]]:
    if count > 1 and rng.random() < 0.25:
        first, other = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], 2)
        kinds = [first, first] if count == 2 else rng.choice(([first] * 3, [first, first, other]))
        rng.shuffle(kinds)
        return kinds
    distinct: list[tuple[Color, Shape]] = []
    while len(distinct) < count:
        kind = (rng.choice(COLORS), rng.choice(SHAPES))
        if kind not in distinct:
            distinct.append(kind)
    return distinct


def _sample_object(rng: random.Random, color: Color, shape: Shape, size: Size) -> SceneObject:
    radius = rng.uniform(*RADII[size])
    low, high = radius + _MARGIN, 1 - radius - _MARGIN
    return SceneObject(shape, color, size, rng.uniform(low, high), rng.uniform(low, high), radius)


def _fits(objects: Sequence[SceneObject], overlap: float) -> bool:
    for index, a in enumerate(objects):
        for b in objects[index + 1 :]:
            reach = a.radius + b.radius - overlap * min(a.radius, b.radius)
            if math.hypot(a.x - b.x, a.y - b.y) < reach + (_MARGIN if overlap == 0 else 0):
                return False
    return True


def sample_scenes(count: int, *, seed: int, overlap: float = 0.0) -> Iterator[Scene]:
    """Iterate over `count` scenes; scene k depends on the seed, k and `overlap` alone.

    Raises:
        ConfigError: `count` is negative, or `overlap` is not 0 to 1.
    """
    if count < 0:
        raise ConfigError(f"count must be 0 or more, got {count}")
    if not 0 <= overlap <= 1:
        raise ConfigError(f"overlap is a share of a radius, 0 to 1, got {overlap}")
    return (
        sample_scene(random.Random(f"{seed}/{index}"), overlap=overlap) for index in range(count)
    )


def perturb(scene: Scene, rng: random.Random) -> Scene:
    """Change one thing: the near twin of a scene, which differs from it; the background stays.

    Colours, sizes or places of the first two objects are exchanged, or one object changes in
    colour, shape or size (its radius at least), or the last of several is taken away.

    Raises:
        ConfigError: The scene is empty.
    """
    if not scene.objects:
        raise ConfigError("an empty scene has no near twin; give it at least one object")
    changes: list[Callable[[Scene, random.Random], Scene]] = [_recolor, _reshape, _resize]
    if len(scene.objects) > 1:
        changes += [_swap_colors, _swap_colors, _swap_sizes, _turn, _turn, _turn, _drop]
    while True:
        twin = rng.choice(changes)(scene, rng)
        if twin != scene and (_fits(twin.objects, 0.9) or not _fits(scene.objects, 0.9)):
            return twin


def _recolor(scene: Scene, rng: random.Random) -> Scene:
    return _replaced(scene, rng, color=rng.choice(COLORS))


def _reshape(scene: Scene, rng: random.Random) -> Scene:
    return _replaced(scene, rng, shape=rng.choice(SHAPES))


def _resize(scene: Scene, rng: random.Random) -> Scene:
    size = rng.choice(SIZES)
    return _replaced(scene, rng, size=size, radius=rng.uniform(*RADII[size]))


def _replaced(scene: Scene, rng: random.Random, **changes: Any) -> Scene:
    objects = list(scene.objects)
    index = rng.randrange(len(objects))
    objects[index] = replace(objects[index], **changes)
    return replace(scene, objects=tuple(objects))


def _swap_colors(scene: Scene, rng: random.Random) -> Scene:
    a, b, *rest = scene.objects
    swapped = (replace(a, color=b.color), replace(b, color=a.color), *rest)
    return replace(scene, objects=swapped)


def _swap_sizes(scene: Scene, rng: random.Random) -> Scene:
    a, b, *rest = scene.objects
    swapped = (
        replace(a, size=b.size, radius=b.radius),
        replace(b, size=a.size, radius=a.radius),
        *rest,
    )
    return replace(scene, objects=swapped)


def _turn(scene: Scene, rng: random.Random) -> Scene:
    return turn(scene)


def _drop(scene: Scene, rng: random.Random) -> Scene:
    return replace(scene, objects=scene.objects[:-1])


def turn(scene: Scene) -> Scene:
    """The same scene with the first two objects' places exchanged: their relation turns round.

    Each keeps its own size, so a large object that comes to an edge is moved back inside.

    Raises:
        ConfigError: The scene has fewer than two objects.
    """
    if len(scene.objects) < 2:
        raise ConfigError(f"two objects are needed to exchange places, got {len(scene.objects)}")
    a, b, *rest = scene.objects
    return replace(scene, objects=(_moved(a, b.x, b.y), _moved(b, a.x, a.y), *rest))


def _moved(thing: SceneObject, x: float, y: float) -> SceneObject:
    low, high = thing.radius + _MARGIN, 1 - thing.radius - _MARGIN
    return replace(thing, x=min(max(x, low), high), y=min(max(y, low), high))
