"""What the answers of trained language models lose under reuse, and how sure that is.

The same questions are answered with reuse and without, so that only questions whose answer turns
from right to wrong, or back, tell anything: their number decides how many questions it takes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import get_args

import torch

from diffenc._typing import Reused
from diffenc.mllm.model import DiffusionVLM
from diffenc.studies.probes import Done
from diffenc.studies.spreads import Spread
from diffenc.studies.vlm.measure import HELD_OUT, ask_questions, is_right

PARTS: tuple[Reused, ...] = get_args(Reused)
LARGEST_LOSS = 0.01
"""Share of the answers that reuse may lose."""

TURNED = 0.04
"""Share of the answers that is expected to turn right or wrong, where nothing is known of it."""

_LIMIT, _POWER = 1.960, 0.842  # of the normal distribution: two-sided 5 %, and 80 %
_TURN = 35  # questions in which each kind meets each number of objects
_EXAMPLES = 20


@dataclass(frozen=True, slots=True)
class AnswerFigure:
    """Answers of one trained language model to the same questions.

    Attributes:
        model: Name of the model.
        questions: Number of questions; each model is asked others.
        exact: Share of right answers without reuse.
        reused: Share of right answers, by part that runs without the text.
        changed: Share of answers that differ from those without reuse, by part.
        turned: Numbers of answers that turned from right to wrong, and from wrong to right, by
            part.
        examples: Questions, true answers, and what was said.
    """

    model: str
    questions: int
    exact: float
    reused: Mapping[Reused, float]
    changed: Mapping[Reused, float]
    turned: Mapping[Reused, tuple[int, int]]
    examples: tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class AnswerLoss:
    """What all models together lose, as shares of their answers.

    Attributes:
        part: Part of the U-Net that runs without the text.
        questions: Number of questions of all models.
        turned: Numbers of answers that turned from right to wrong, and from wrong to right.
        lost: Right answers without reuse less those with it, mean over questions.
        interval: Confidence interval of `lost` over questions, 95 %, for these models.
        by_model: What each model loses.
    """

    part: Reused
    questions: int
    turned: tuple[int, int]
    lost: float
    interval: tuple[float, float]
    by_model: Spread

    @property
    def verdict(self) -> str:
        """Whether at most `LARGEST_LOSS` is lost, by the interval alone."""
        low, high = self.interval
        if high <= LARGEST_LOSS:
            return "holds"
        if low > LARGEST_LOSS:
            return "opposite"
        needed = questions_needed(sum(self.turned) / self.questions)
        return f"not decided; {needed} questions would decide no loss"


def loss_over(figures: Sequence[AnswerFigure], part: Reused) -> AnswerLoss:
    """Loss of several models under one kind of reuse.

    Source:
        Agresti and Min 2005 (Simple improved confidence intervals for comparing matched
        proportions, Statistics in Medicine 24): half an answer is added to each of the four counts,
        so that an interval has a width where no answer turned.
    """
    questions = sum(figure.questions for figure in figures)
    away, back = (sum(figure.turned[part][way] for figure in figures) for way in (0, 1))
    count, lost, won = questions + 2, away + 0.5, back + 0.5
    middle = (lost - won) / count
    deviation = math.sqrt((lost + won) / count - middle**2)
    half = _LIMIT * deviation / math.sqrt(count)
    return AnswerLoss(
        part,
        questions,
        (away, back),
        (away - back) / questions,
        (middle - half, middle + half),
        Spread(tuple((f.turned[part][0] - f.turned[part][1]) / f.questions for f in figures)),
    )


def questions_needed(turned: float = TURNED, *, largest: float = LARGEST_LOSS) -> int:
    """Number of questions after which the interval excludes a loss, where nothing is lost.

    With a chance of 80 %: paired differences are -1, 0 or 1, and their variance is the share of
    answers that turn.

    Args:
        turned: Share of the answers that turn from right to wrong or back.
        largest: Loss that is to be excluded, as a share of the answers.
    """
    return math.ceil(turned * ((_LIMIT + _POWER) / largest) ** 2)


def questions_each(models: int) -> int:
    """Number of questions for each of some models, so that together they decide."""
    return _TURN * math.ceil(questions_needed() / (_TURN * models))


def answer_figure(
    folder: Path, name: str, number: int, questions: int, device: str | torch.device, done: Done
) -> AnswerFigure:
    """What one language model answers with and without reuse.

    Args:
        folder: Folder of the model.
        name: Name of the model in tables.
        number: Number of the model, from 0; each is asked about scenes of its own.
        questions: Number of questions.
        device: Device that the model runs on.
        done: Count of what is done: one for each time that all questions are answered.
    """
    said: dict[Reused | None, list[str]] = {}
    for part in (None, *PARTS):
        vlm = DiffusionVLM.from_pretrained(folder, device=device, reuse=part)
        seed = HELD_OUT["answers"] + number
        posed, said[part] = ask_questions(vlm.generate, questions, seed=seed)
        done.add(1)
    right = {
        part: [is_right(text, question) for text, question in zip(texts, posed, strict=True)]
        for part, texts in said.items()
    }
    pairs = {part: list(zip(right[None], right[part], strict=True)) for part in PARTS}
    changed = {
        part: mean(one != two for one, two in zip(said[part], said[None], strict=True))
        for part in PARTS
    }
    examples = tuple(
        {
            "question": question.text,
            "true": question.answer,
            "exact": said[None][row],
            **{part: said[part][row] for part in PARTS},
        }
        for row, question in enumerate(posed[:_EXAMPLES])
    )
    return AnswerFigure(
        model=name,
        questions=questions,
        exact=mean(right[None]),
        reused={part: mean(right[part]) for part in PARTS},
        changed=changed,
        turned={
            part: (pairs[part].count((True, False)), pairs[part].count((False, True)))
            for part in PARTS
        },
        examples=examples,
    )
