"""Items of a benchmark of questions with options."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from diffenc.evals.items import Benchmark, Picture

Score = Literal["pairs", "tasks", "groups"]

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""As LLaVA-1.5 was trained to be asked (Liu et al. 2023, arXiv:2310.03744, section 3.2)."""


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """A question with options on one picture or several.

    Attributes:
        id: Id of the question, unique in its benchmark.
        pictures: Pictures in the order in which the question counts them.
        question: Text of the question without its options.
        text: Text of the question with its options as the benchmark has it; the language model is
            asked this.
        options: Words of the options, without letters.
        answer: Index of the right option.
        group: Name of the pair or subtask that the question is counted with.
        labels: Labels that results may be split by, by kind of label.
    """

    id: str
    pictures: tuple[Picture, ...]
    question: str
    text: str
    options: tuple[str, ...]
    answer: int
    group: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ChoiceBenchmark(Benchmark[ChoiceItem]):
    """Questions with options.

    Attributes:
        score: Rule of the overall result: the share of "pairs" whose two answers are both right,
            the mean of the accuracies of "tasks", subtasks of the benchmark such as BLINK's
            fourteen, or the share of "groups" of two pictures and two questions whose four answers
            are all right.
        groups: Names of all groups of the published benchmark, in its order; empty for a benchmark
            with other groups.
    """

    score: Score
    groups: tuple[str, ...] = ()
