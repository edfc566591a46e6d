"""Texts for training: captions, questions, and questions with their answers, of one scene."""

import random

from diffenc.shapes.captions import caption
from diffenc.shapes.questions import multiple_choice, sample_question
from diffenc.shapes.scenes import Scene


def training_text(scene: Scene, rng: random.Random, *, bare_questions: float = 0.05) -> str:
    """Mostly a caption; now and then a question, with its answer or bare, as users will ask."""
    draw = rng.random()
    if draw > 0.12:
        return caption(scene, rng)
    question = sample_question(scene, rng)
    if rng.random() < 0.15:
        question = multiple_choice(question, rng)
    return question.text if draw < bare_questions else f"{question.text} {question.answer}"
