"""Scenes and texts for training: captions, questions, and questions with their answers."""

import random

from diffenc.shapes.captions import caption
from diffenc.shapes.questions import multiple_choice, sample_question
from diffenc.shapes.scenes import COLORS, SHAPES, Scene, sample_scene

COUNTED, SIZED = 0.2, 0.2
"""Shares of scenes whose captions must count, and must tell sizes; both are rare otherwise."""


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
