"""Scenes and texts for training: captions, questions, and questions with their answers."""

import random
import re
from dataclasses import replace

from diffenc.shapes.captions import RELATION_PHRASES, caption
from diffenc.shapes.crowds import sample_crowd
from diffenc.shapes.questions import multiple_choice, sample_question
from diffenc.shapes.scenes import COLORS, SHAPES, Relation, Scene, perturb, sample_scene, turn

COUNTED, SIZED = 0.2, 0.2
"""Shares of scenes whose captions must count, and must tell sizes; both are rare otherwise."""

_OPENING = re.compile(r"^(a picture of|a photo of|there is|there are|we see) ")

_TURNED: dict[Relation, Relation] = {"right of": "left of", "below": "above"}
_RELATIONS = {
    phrase: (_TURNED.get(relation, relation), relation in _TURNED)
    for relation, phrases in RELATION_PHRASES.items()
    for phrase in reversed(phrases)  # "to the left of" before "left of"
}
"""Per phrase the relation that it comes to, and whether the objects change places for it."""


def any_scene(rng: random.Random, crowds: float, overlap: float = 0.0) -> Scene:
    """A scene; with probability `crowds` a crowded one."""
    if crowds and rng.random() < crowds:
        return sample_crowd(rng)
    return sample_scene(rng, overlap=overlap)


def training_scene(rng: random.Random) -> tuple[Scene, tuple[str, ...]]:
    """A scene, and words of which its captions must have one (any caption where there are none)."""
    draw = rng.random()
    overlap = rng.choice((0.0, 0.0, 0.4))
    if draw > COUNTED + SIZED:
        return sample_scene(rng, overlap=overlap), ()
    colors, shapes = rng.sample(COLORS, 2), rng.sample(SHAPES, 2)
    kinds = list(zip(colors, shapes, strict=True))
    if draw < COUNTED:
        kinds.append(kinds[0])
        rng.shuffle(kinds)
        return sample_scene(rng, kinds=kinds, overlap=overlap), ("two",)
    return sample_scene(rng, kinds=kinds, sizes=["small", "large"]), ("small", "large", "big")


def training_text(
    scene: Scene,
    rng: random.Random,
    *,
    bare_questions: float = 0.05,
    saying: tuple[str, ...] = (),
) -> str:
    """Mostly a caption; now and then a question, with its answer or bare, as users will ask.

    `saying` are words of which a caption must have one.
    """
    draw = rng.random()
    if draw > 0.12:
        while True:
            text = caption(scene, rng)
            if not saying or not set(saying).isdisjoint(text.split()):
                return text
    question = sample_question(scene, rng)
    if rng.random() < 0.15:
        question = multiple_choice(question, rng)
    return question.text if draw < bare_questions else f"{question.text} {question.answer}"


def wrong_captions(
    scene: Scene, texts: list[str], rng: random.Random, *, draws: int = 16
) -> list[str | None]:
    """For each text what would be said of a near twin and not of the scene, in much the same words.

    None for questions, and where `draws` captions of the twin held nothing of the kind. Meanings
    are compared as words: a caption of another form may be true all the same, as 3.5 % were.
    """
    true = {said(caption(scene, rng)) for _ in range(2 * draws)} | {said(text) for text in texts}
    return [
        None if "?" in text else _wrong_caption(scene, text, true, rng, draws) for text in texts
    ]


def _wrong_caption(
    scene: Scene, text: str, true: set[tuple[str, ...]], rng: random.Random, draws: int
) -> str | None:
    twin, words = near_twin(scene, rng), text.split()
    length = sum(len(part.split()) for part in said(text))
    found, best = None, -1
    for _ in range(draws):
        other = caption(twin, rng)
        meaning = said(other)
        if meaning in true or sum(len(part.split()) for part in meaning) != length:
            continue
        alike = sum(a == b for a, b in zip(words, other.split(), strict=False))
        if alike > best:
            found, best = other, alike
    return found


def said(text: str) -> tuple[str, ...]:
    """What a caption says, however it is put: its phrases in a fixed order, and a relation."""
    text = _OPENING.sub("", text).replace("big ", "large ")
    for phrase, (relation, turned) in _RELATIONS.items():
        first, there, second = text.partition(f" {phrase} ")
        if there:
            return (second, relation, first) if turned else (first, relation, second)
    return tuple(sorted(text.replace(", ", " and ").split(" and ")))


def near_twin(scene: Scene, rng: random.Random) -> Scene:
    """Often the numbers, the places or the sizes exchanged: what is learnt last; else all else."""
    if len(scene.objects) == 3 and len(scene.groups()) == 2 and rng.random() < 0.7:
        return numbers_exchanged(scene)
    if len(scene.objects) > 1:
        draw = rng.random()
        if draw < 0.35:
            return turn(scene)
        if draw < 0.6:
            return sizes_exchanged(scene)
    return perturb(scene, rng)


def numbers_exchanged(scene: Scene) -> Scene:
    """Of three objects of two kinds, one of the two alike becomes as the third."""
    (_, first), (_, second) = scene.groups()
    alike, single = (first, second) if len(first) == 2 else (second, first)
    objects = list(scene.objects)
    as_third = objects[single[0]]
    objects[alike[0]] = replace(objects[alike[0]], color=as_third.color, shape=as_third.shape)
    return replace(scene, objects=tuple(objects))


def sizes_exchanged(scene: Scene) -> Scene:
    """The first two objects with each other's size, where they are."""
    a, b, *rest = scene.objects
    exchanged = (
        replace(a, size=b.size, radius=b.radius),
        replace(b, size=a.size, radius=a.radius),
    )
    return replace(scene, objects=(*exchanged, *rest))
