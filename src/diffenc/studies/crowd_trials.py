"""Crowded scenes with four questions each, and what is true: words that fit one object only."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from diffenc.checks.arguments import flag, whole
from diffenc.shapes.crowds import sample_crowd
from diffenc.shapes.scenes import COLORS, SHAPES, Color, Scene, SceneObject, Shape

CrowdProperty = Literal["color", "shape", "position", "relation"]
CROWD_PROPERTIES: tuple[CrowdProperty, ...] = get_args(CrowdProperty)

ANSWERS: dict[CrowdProperty, tuple[str, ...]] = {
    "color": COLORS,
    "shape": SHAPES,
    "position": tuple(
        f"{row} {column}"
        for row in ("top", "middle", "bottom")
        for column in ("left", "middle", "right")
    ),
    "relation": ("yes", "no"),
}
"""Answers of each property. Positions are the ninths of the picture, row by row."""

_HELD_OUT, _VALIDATION = 960_000, 860_001


@dataclass(frozen=True, slots=True)
class CrowdQuestion:
    """A question about one or two objects of a crowded scene.

    Attributes:
        asks: Property that is asked for.
        text: Text of the question.
        label: Index of the right answer among `ANSWERS[asks]`.
        things: Indices of the objects that are named, in the order of the text.
        names: Words that name each of them and, together, no other object of the scene.
        nouns: Word of each of them whose place is the object's.
    """

    asks: CrowdProperty
    text: str
    label: int
    things: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]
    nouns: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The right answer in words."""
        return ANSWERS[self.asks][self.label]


@dataclass(frozen=True, slots=True)
class CrowdTrial:
    """A crowded scene and its questions.

    Attributes:
        scene: Scene of five to nine objects.
        questions: One question after each of `CROWD_PROPERTIES`, in that order.
    """

    scene: Scene
    questions: tuple[CrowdQuestion, ...]


def sample_crowd_trials(count: int, *, seed: int, validation: bool = False) -> list[CrowdTrial]:
    """Crowded scenes that no bundled model was trained on, with balanced answers.

    Within each block of as many scenes as a property has answers, every answer is right once, in a
    random order of its own.

    Args:
        count: Number of scenes.
        seed: Seed of the scenes, 0 or more; trial k depends on the seed, k and `validation` alone.
        validation: Whether scenes are drawn that settings are chosen on; others are held out.

    Raises:
        ConfigError: A negative count or seed.
    """
    whole("count", count, least=0)
    whole("seed", seed, least=0)
    base = _VALIDATION if flag("validation", validation) else _HELD_OUT
    return [_sample(f"budget/{base + seed}", index) for index in range(count)]


def questions_of(scene: Scene, rng: random.Random) -> dict[CrowdProperty, dict[int, CrowdQuestion]]:
    """For each property and answer one question about this scene, where there is one.

    Args:
        scene: Scene that is asked about.
        rng: Random generator that chooses among several.
    """
    return {name: _one_each(maker(scene), rng) for name, maker in _MAKERS.items()}


def ninth(thing: SceneObject) -> int:
    """Ninth of the picture that holds the centre of an object, row by row."""
    return 3 * min(int(3 * thing.y), 2) + min(int(3 * thing.x), 2)


def _sample(source: str, index: int) -> CrowdTrial:
    labels = {name: _balanced(source, name, index) for name in CROWD_PROPERTIES}
    rng = random.Random(f"{source}/{index}")
    while True:
        scene = _renamed(sample_crowd(rng), rng, COLORS[labels["color"]], SHAPES[labels["shape"]])
        questions = {} if scene is None else questions_of(scene, rng)
        if scene is not None and all(labels[name] in own for name, own in questions.items()):
            return CrowdTrial(scene, tuple(own[labels[name]] for name, own in questions.items()))


def _renamed(scene: Scene, rng: random.Random, color: Color, shape: Shape) -> Scene | None:
    """Two colours and two shapes exchanged everywhere, so that questions have these answers.

    None where no word fits one object only. To wait for a scene with them takes eight times longer.
    """
    by_shape = [each for each in scene.objects if scene.count(shape=each.shape) == 1]
    by_color = [each for each in scene.objects if scene.count(color=each.color) == 1]
    if not by_shape or not by_color:
        return None
    its_color, its_shape = rng.choice(by_shape).color, rng.choice(by_color).shape
    colors: dict[Color, Color] = {its_color: color, color: its_color}
    shapes: dict[Shape, Shape] = {its_shape: shape, shape: its_shape}
    things = (
        replace(
            each,
            color=colors.get(each.color, each.color),
            shape=shapes.get(each.shape, each.shape),
        )
        for each in scene.objects
    )
    return replace(scene, objects=tuple(things))


def _balanced(source: str, name: CrowdProperty, index: int) -> int:
    block, place = divmod(index, len(ANSWERS[name]))
    order = list(range(len(ANSWERS[name])))
    random.Random(f"{source}/{name}/{block}").shuffle(order)
    return order[place]


def _one_each(questions: Sequence[CrowdQuestion], rng: random.Random) -> dict[int, CrowdQuestion]:
    shuffled = rng.sample(questions, len(questions))
    return {question.label: question for question in shuffled}


def _after_color(scene: Scene) -> list[CrowdQuestion]:
    return [
        CrowdQuestion(
            "color",
            f"what color is the {thing.shape}?",
            COLORS.index(thing.color),
            (index,),
            ((thing.shape,),),
            (thing.shape,),
        )
        for index, thing in enumerate(scene.objects)
        if scene.count(shape=thing.shape) == 1
    ]


def _after_shape(scene: Scene) -> list[CrowdQuestion]:
    return [
        CrowdQuestion(
            "shape",
            f"what shape is the {thing.color} object?",
            SHAPES.index(thing.shape),
            (index,),
            ((thing.color,),),
            ("object",),
        )
        for index, thing in enumerate(scene.objects)
        if scene.count(color=thing.color) == 1
    ]


def _after_position(scene: Scene) -> list[CrowdQuestion]:
    questions = []
    for index in _by_both(scene):
        thing = scene.objects[index]
        questions.append(
            CrowdQuestion(
                "position",
                f"where is the {thing.color} {thing.shape}?",
                ninth(thing),
                (index,),
                (thing.kind,),
                (thing.shape,),
            )
        )
    return questions


def _after_relation(scene: Scene) -> list[CrowdQuestion]:
    """Left or right of: of two shapes, since a word that stands twice gathers one token."""
    questions = []
    named = _by_both(scene)
    for first in named:
        for second in named:
            a, b = scene.objects[first], scene.objects[second]
            relation = None if first == second else scene.relation(first, second)
            if a.shape == b.shape or relation not in ("left of", "right of"):
                continue
            text = f"is the {a.color} {a.shape} left of the {b.color} {b.shape}?"
            label = 0 if relation == "left of" else 1
            questions.append(
                CrowdQuestion(
                    "relation", text, label, (first, second), (a.kind, b.kind), (a.shape, b.shape)
                )
            )
    return questions


def _by_both(scene: Scene) -> list[int]:
    """Objects that colour and shape together name."""
    return [
        index
        for index, thing in enumerate(scene.objects)
        if scene.count(shape=thing.shape, color=thing.color) == 1
    ]


_MAKERS: dict[CrowdProperty, Callable[[Scene], list[CrowdQuestion]]] = {
    "color": _after_color,
    "shape": _after_shape,
    "position": _after_position,
    "relation": _after_relation,
}
