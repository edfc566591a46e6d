"""Contrast pairs: two scenes and two captions that differ in one thing only, with known truth.

`mmvp_pairs` is built like MMVP-VLM (near-same images, one visual pattern each), `winoground_items`
like Winoground (same or near-same words in another order). In both, caption k is true of scene k
and false of the other one.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

from diffenc.errors import ConfigError
from diffenc.shapes.captions import PLACE_PHRASES, RELATION_PHRASES, noun_phrase
from diffenc.shapes.scenes import (
    COLORS,
    RADII,
    RELATIONS,
    SHAPES,
    Color,
    Place,
    Relation,
    Scene,
    SceneObject,
    Shape,
    Size,
    sample_scene,
    turn,
)

MmvpPattern = Literal["color", "count", "position", "relation", "shape", "size"]
WinogroundKind = Literal["noun", "color", "relation", "count", "size"]
MMVP_PATTERNS: tuple[MmvpPattern, ...] = get_args(MmvpPattern)
WINOGROUND_KINDS: tuple[WinogroundKind, ...] = get_args(WinogroundKind)

_Word = TypeVar("_Word", bound=str)

_OPPOSITE: dict[Place, Place] = {
    "left": "right",
    "right": "left",
    "top": "bottom",
    "bottom": "top",
}
_CENTERS: dict[Place, tuple[float, float]] = {
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
}


@dataclass(frozen=True, slots=True)
class ContrastPair:
    """Two scenes and two captions: caption k is true of scene k and false of the other.

    Attributes:
        kind: Pattern, or kind of word order, in which the scenes differ.
        scenes: The two scenes.
        captions: The two captions, in the order of the scenes.
    """

    kind: str
    scenes: tuple[Scene, Scene]
    captions: tuple[str, str]


def mmvp_pairs(
    per_pattern: int, *, seed: int, patterns: Sequence[MmvpPattern] = MMVP_PATTERNS
) -> list[ContrastPair]:
    """`per_pattern` pairs of near-same images for each pattern (MMVP-VLM has 15 for each of nine).

    Raises:
        ConfigError: An unknown pattern, or a negative number.
    """
    return _sample_all(_MMVP, patterns, per_pattern, f"mmvp/{seed}")


def winoground_items(
    per_kind: int, *, seed: int, kinds: Sequence[WinogroundKind] = WINOGROUND_KINDS
) -> list[ContrastPair]:
    """`per_kind` items for each kind: a noun or colour word changed, or the same words reordered.

    Raises:
        ConfigError: An unknown kind, or a negative number.
    """
    return _sample_all(_WINOGROUND, kinds, per_kind, f"winoground/{seed}")


_Maker = Callable[[random.Random], tuple[tuple[Scene, Scene], tuple[str, str]]]


def _sample_all(
    makers: dict[str, _Maker], kinds: Sequence[str], count: int, seed: str
) -> list[ContrastPair]:
    if unknown := sorted(set(kinds) - makers.keys()):
        raise ConfigError(f"unknown kinds {unknown}; known are {sorted(makers)}")
    if count < 0:
        raise ConfigError(f"the number of pairs must be 0 or more, got {count}")
    return [
        ContrastPair(kind, *makers[kind](random.Random(f"{seed}/{kind}/{index}")))
        for kind in kinds
        for index in range(count)
    ]


def _other(rng: random.Random, known: Sequence[_Word], *taken: str) -> _Word:
    return rng.choice([word for word in known if word not in taken])


def _np(thing: SceneObject, *, size: bool = False, count: int = 1) -> str:
    word = thing.size if size else None
    return noun_phrase(shape=thing.shape, color=thing.color, size_word=word, count=count)


def _two_kinds(rng: random.Random) -> list[tuple[Color, Shape]]:
    """Two kinds that differ in colour and in shape, so that an exchange changes the picture."""
    colors, shapes = rng.sample(COLORS, 2), rng.sample(SHAPES, 2)
    return list(zip(colors, shapes, strict=True))


def _with_object(scene: Scene, index: int, thing: SceneObject) -> Scene:
    objects = list(scene.objects)
    objects[index] = thing
    return replace(scene, objects=tuple(objects))


def _resized(rng: random.Random, thing: SceneObject, size: Size) -> SceneObject:
    return replace(thing, size=size, radius=rng.uniform(*RADII[size]))


def _related(scene: Scene, relation: Relation) -> str:
    phrase = RELATION_PHRASES[relation][0]
    return f"{_np(scene.objects[0])} {phrase} {_np(scene.objects[1])}"


def _color_pair(rng: random.Random) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
    scene = sample_scene(rng, count=1)
    thing = scene.objects[0]
    changed = replace(thing, color=_other(rng, COLORS, thing.color))
    return (scene, _with_object(scene, 0, changed)), (_np(thing), _np(changed))


def _shape_pair(rng: random.Random) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
    scene = sample_scene(rng, count=1)
    thing = scene.objects[0]
    changed = replace(thing, shape=_other(rng, SHAPES, thing.shape))
    return (scene, _with_object(scene, 0, changed)), (_np(thing), _np(changed))


def _size_pair(rng: random.Random) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
    scene = sample_scene(rng, count=1, sizes=["large"])
    small = _resized(rng, scene.objects[0], "small")
    other = _with_object(scene, 0, small)
    return (scene, other), (_np(scene.objects[0], size=True), _np(small, size=True))


def _count_pair(rng: random.Random) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
    kind = (rng.choice(COLORS), rng.choice(SHAPES))
    scene = sample_scene(rng, kinds=[kind] * 3)
    fewer = replace(scene, objects=scene.objects[:-1])
    thing = scene.objects[0]
    # Never two against one: where there are two red circles, "a red circle" is true as well.
    return (scene, fewer), (_np(thing, count=3), _np(thing, count=2))


def _position_pair(rng: random.Random) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
    scene = sample_scene(rng, count=1)
    thing = scene.objects[0]
    places: list[Place] = [rng.choice(list(_OPPOSITE))]
    places.append(_OPPOSITE[places[0]])
    scenes = []
    for place in places:
        x, y = _CENTERS[place]
        scenes.append(_with_object(scene, 0, replace(thing, x=x, y=y)))
    texts = [f"{_np(thing)} {PLACE_PHRASES[place]}" for place in places]
    return (scenes[0], scenes[1]), (texts[0], texts[1])


def _relation_pair(rng: random.Random) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
    relation, kinds = rng.choice(RELATIONS), _two_kinds(rng)
    while True:
        scene = sample_scene(rng, kinds=kinds, relation=relation)
        turned = turn(scene)
        # `turn` may push a large object back from an edge, and with it the relation.
        if turned.relation(1, 0) == relation:
            break
    first, second = scene.objects[:2]
    phrase = RELATION_PHRASES[relation][0]
    return (scene, turned), (
        f"{_np(first)} {phrase} {_np(second)}",
        f"{_np(second)} {phrase} {_np(first)}",
    )


def _noun_item(rng: random.Random) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
    relation = rng.choice(RELATIONS)
    kinds = _two_kinds(rng)
    scene = sample_scene(rng, kinds=kinds, relation=relation)
    index = rng.randrange(2)
    thing = scene.objects[index]
    if rng.random() < 0.5:
        changed = replace(thing, shape=_other(rng, SHAPES, *(shape for _, shape in kinds)))
    else:
        changed = replace(thing, color=_other(rng, COLORS, *(color for color, _ in kinds)))
    other = _with_object(scene, index, changed)
    return (scene, other), (_related(scene, relation), _related(other, relation))


def _color_item(rng: random.Random) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
    relation = rng.choice(RELATIONS)
    scene = sample_scene(rng, kinds=_two_kinds(rng), relation=relation)
    a, b = scene.objects
    swapped = replace(scene, objects=(replace(a, color=b.color), replace(b, color=a.color)))
    return (scene, swapped), (_related(scene, relation), _related(swapped, relation))


def _count_item(rng: random.Random) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
    a, b = _two_kinds(rng)
    scenes = (sample_scene(rng, kinds=[a, a, b]), sample_scene(rng, kinds=[a, b, b]))
    texts = [
        f"{_np(scene.objects[0], count=first)} and {_np(scene.objects[2], count=3 - first)}"
        for scene, first in zip(scenes, (2, 1), strict=True)
    ]
    alike = (scenes[0], replace(scenes[1], background=scenes[0].background))
    return alike, (texts[0], texts[1])


def _size_item(rng: random.Random) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
    kinds = _two_kinds(rng)
    scene = sample_scene(rng, kinds=kinds, sizes=["small", "large"])
    other = sample_scene(rng, kinds=kinds, sizes=["large", "small"])
    texts = [
        f"{_np(one.objects[0], size=True)} and {_np(one.objects[1], size=True)}"
        for one in (scene, other)
    ]
    return (scene, replace(other, background=scene.background)), (texts[0], texts[1])


_MMVP: dict[str, _Maker] = {
    "color": _color_pair,
    "count": _count_pair,
    "position": _position_pair,
    "relation": _relation_pair,
    "shape": _shape_pair,
    "size": _size_pair,
}
_WINOGROUND: dict[str, _Maker] = {
    "noun": _noun_item,
    "color": _color_item,
    "relation": _relation_pair,
    "count": _count_item,
    "size": _size_item,
}
