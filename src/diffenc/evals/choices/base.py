"""What a benchmark of questions with options is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from diffenc.evals.base import Picture, Problem

Score = Literal["pairs", "tasks"]

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""As LLaVA-1.5 was trained to be asked (Liu et al. 2023, arXiv:2310.03744, section 3.2)."""


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """A question with options on one picture or several.

    Attributes:
        id: Unique in its benchmark.
        pictures: In the order in which the question counts them.
        question: Without options.
        text: With options, as the benchmark has it; what the language model is asked.
        options: Their words, without letters.
        answer: Index of the right one.
        group: What it counts with: its pair, or its task.
        labels: What results may be split by.
    """

    id: str
    pictures: tuple[Picture, ...]
    question: str
    text: str
    options: tuple[str, ...]
    answer: int
    group: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChoiceBenchmark:
    """Questions with options.

    Attributes:
        name: Whose rules these are.
        source: Where the items come from.
        items: Those that could be made.
        score: The result is the share of "pairs" whose two answers are both right, or the mean of
            the accuracies of "tasks".
        groups: Names of all groups that the published benchmark has, in its order; empty where it
            is not that one.
        expected: How many items the published benchmark has; None: it is not that one.
        problems: What was wrong with its files.
        notes: What is worth knowing and stops nothing.
    """

    name: str
    source: str
    items: tuple[ChoiceItem, ...]
    score: Score
    groups: tuple[str, ...] = ()
    expected: int | None = None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
