"""Ask a model questions with options, read its answers, and count."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from diffenc.evals.answerers import Answerer
from diffenc.evals.asking import AnswerEvaluation, Query, asking
from diffenc.evals.choices.base import ChoiceBenchmark, ChoiceItem, Score
from diffenc.evals.choices.extraction import Rule, extract_choice
from diffenc.evals.inspection import Progress
from diffenc.evals.paper import published_table
from diffenc.evals.results import Result, mean, not_measured, percent
from diffenc.evals.tables import Table

GROUP_LABELS = ("question", "image")
"""Labels of the questions of a group; all right by one of them is NaturalBench's Q or I."""

Reader = Callable[[str, Sequence[str]], tuple[int, Rule] | None]
"""Function from an answer and its options to the option's index; see `extract_choice`."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An answer, and how it was read.

    Attributes:
        answer: Text that the model answered.
        index: Index of the option that the answer means; None if the answer cannot be read.
        rule: Rule that found the option; None if the answer cannot be read.
        right: Whether the option is the right one; unread answers are wrong.
    """

    answer: str
    index: int | None
    rule: Rule | None
    right: bool


@dataclass(frozen=True, kw_only=True)
class ChoiceEvaluation(AnswerEvaluation[ChoiceItem]):
    """Answers of a model to questions with options.

    Attributes:
        benchmark: Benchmark whose questions were asked.
        choices: Answer of the model to each item and how it was read, by id of the item.
    """

    benchmark: ChoiceBenchmark
    choices: Mapping[str, Choice]

    @property
    def overall(self) -> float:
        """The benchmark's own number, in percent: of pairs or groups, or the mean over subtasks."""
        if self.benchmark.score == "tasks":
            return mean([result.mean for result in self.by_group().values()])
        return self.all_right()

    @property
    def accuracy(self) -> float:
        """Percentage of single questions that are answered rightly."""
        return mean([100.0 * self.choices[item.id].right for item in self.items])

    def all_right(self, *labels: str) -> float:
        """Percentage of sets of questions that are all answered rightly.

        Args:
            labels: Kinds of label that the questions of a set share beside their group: "question"
                gives NaturalBench's question accuracy, "image" its image accuracy.
        """
        return self._sets(labels, lambda item: float(self.choices[item.id].right))

    def chance_of(self, *labels: str) -> float:
        """What independent guesses reach on average in `all_right`, in percent."""
        return self._sets(labels, lambda item: 1 / len(item.options))

    @property
    def chance(self) -> float:
        """Overall result that independent guesses reach on average, in percent."""
        if self.benchmark.score != "tasks":
            return self.chance_of()
        groups: dict[str, list[float]] = {}
        for item in self.items:
            groups.setdefault(item.group, []).append(1 / len(item.options))
        return 100 * mean([mean(each) for each in groups.values()])

    def _sets(self, labels: Sequence[str], value: Callable[[ChoiceItem], float]) -> float:
        """Mean over sets of the product of their questions' values, in percent."""
        sets: dict[tuple[str, ...], list[float]] = {}
        for item in self.items:
            key = (item.group, *(item.labels[label] for label in labels))
            sets.setdefault(key, []).append(value(item))
        return 100 * mean([math.prod(each) for each in sets.values()])

    @property
    def unread(self) -> int:
        """Number of answers that mean no single option."""
        return sum(self.choices[item.id].index is None for item in self.items)

    @property
    def unread_share(self) -> float:
        """Share of the answers that mean no single option, 0 to 1."""
        return self.unread / len(self.items) if self.items else 0.0

    @property
    def not_measured(self) -> str | None:
        """Why the numbers are none: too many answers are unread; None where they are some."""
        return not_measured(self.unread_share)

    def by_group(self) -> dict[str, Result]:
        """Accuracy of each group of questions, in the benchmark's order."""
        right: dict[str, list[bool]] = {}
        for item in self.items:
            right.setdefault(item.group, []).append(self.choices[item.id].right)
        known = [name for name in self.benchmark.groups if name in right]
        order = dict.fromkeys([*known, *right])
        return {name: Result((100 * mean(right[name]),), len(right[name])) for name in order}

    def by_label(self, kind: str) -> dict[str, float]:
        """The benchmark's own number over the items of each label of a kind."""
        labels = dict.fromkeys(item.labels[kind] for item in self.items if kind in item.labels)
        return {label: self._of(kind, label).overall for label in labels}

    def _of(self, kind: str, label: str) -> "ChoiceEvaluation":
        return replace(
            self, items=tuple(item for item in self.items if item.labels.get(kind) == label)
        )

    def _group_accuracies(self) -> dict[str, float]:
        if self.benchmark.score != "groups":
            return {}
        return {f"{label}_accuracy": self.all_right(label) for label in GROUP_LABELS}

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on data, on how answers were read, and on items that were left out."""
        rules = Counter(choice.rule for choice in self.choices.values() if choice.rule)
        read = ", ".join(f"{rule} {count}" for rule, count in rules.most_common())
        said = (
            f"answers read by {read or 'no rule'}; {self.unread} unread, which count as wrong "
            f"({100 * self.unread_share:.1f} percent of {len(self.items)})"
        )
        refused = f"; {self.model} is {self.not_measured}" if self.not_measured else ""
        return (*super().notes, said + refused)

    def to_dict(self) -> dict[str, Any]:
        """Every number and answer, as JSON holds it."""
        return {
            **super().to_dict(),
            "score": self.benchmark.score,
            "overall": self.overall,
            "accuracy": self.accuracy,
            "chance": self.chance,
            **self._group_accuracies(),
            "unread": self.unread,
            "unread_share": self.unread_share,
            "not_measured": self.not_measured,
            "groups": {name: result.mean for name, result in self.by_group().items()},
            "answers": {name: asdict(choice) for name, choice in self.choices.items()},
            "notes": list(self.notes),
        }


def evaluate_choices(
    benchmark: ChoiceBenchmark,
    model: Answerer,
    *,
    prompts: Callable[[ChoiceItem], str] | None = None,
    reader: Reader = extract_choice,
    results: "Path | None" = None,
    batch_size: int = 8,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> ChoiceEvaluation:
    """Ask every question once. Options stand in the order of the benchmark.

    All pictures are looked at before the first question is asked. With a results file nothing that
    is in it is asked again. Answers are read anew on each call, so `reader` may change.

    Args:
        benchmark: Benchmark whose questions are asked.
        model: Model that answers the questions.
        prompts: Function that makes the encoder's prompt of an item, `lambda item: item.question`
            for the paper's; None leaves the choice to the model.
        reader: Function that finds the option that an answer means.
        results: JSON lines file that keeps the answers; None keeps nothing.
        batch_size: Largest number of questions in one call of the model.
        skip_broken: Whether items with broken pictures, and with them their pairs, are left out,
            instead of raising an error.
        progress: Function that is called with the number of answered questions and the number of
            all questions; None reports nothing.

    Raises:
        ConfigError: Broken items, none that is whole, or a results file of something else.
        OutputError: The results file cannot be written.
        ShapeError: The model returns something else than one text per question.

    Examples:
        >>> from diffenc.evals import FunctionAnswerer
        >>> from diffenc.evals.choices import shapes_naturalbench
        >>> model = FunctionAnswerer("blind", lambda images, questions: ["yes"] * len(questions))
        >>> evaluation = evaluate_choices(shapes_naturalbench(2), model)
        >>> evaluation.accuracy, evaluation.all_right("question"), evaluation.overall
        (50.0, 0.0, 0.0)
    """
    with asking(
        benchmark,
        model,
        results=results,
        batch_size=batch_size,
        skip_broken=skip_broken,
        progress=progress,
        keep=_WHOLE[benchmark.score],
    ) as asker:
        answers = asker.ask(
            [
                Query(item.id, item.pictures, item.text, None if prompts is None else prompts(item))
                for item in asker.items
            ]
        )
    return ChoiceEvaluation(
        benchmark=benchmark,
        choices={item.id: _choice(item, answers[item.id], reader) for item in asker.items},
        **asker.facts(),
    )


def _whole_groups(items: Sequence[ChoiceItem], size: int) -> list[ChoiceItem]:
    sizes = Counter(item.group for item in items)
    return [item for item in items if sizes[item.group] == size]


_WHOLE: Mapping[Score, Callable[[Sequence[ChoiceItem]], Sequence[ChoiceItem]]] = {
    "pairs": partial(_whole_groups, size=2),
    "tasks": tuple,
    "groups": partial(_whole_groups, size=4),
}


def choice_table(evaluations: Sequence[ChoiceEvaluation], *, paper: bool | None = None) -> Table:
    """Make a table of models: accuracy of subtasks and questions, and the overall result.

    The title says how many answers are unread. Where they are too many, "not measured" stands in
    place of the model's numbers, see `diffenc.evals.results.not_measured`.

    Args:
        evaluations: Evaluations of the same benchmark.
        paper: Whether the paper's rows are added; None adds them unless the items are miniatures.
    """
    first = evaluations[0]
    score = first.benchmark.score
    subtasks = tuple(first.by_group()) if score == "tasks" else ()
    rows = [_row(each, subtasks) for each in evaluations]
    chances = [_chance(first, name) for name in subtasks]
    chances.append(100 * mean([1 / len(item.options) for item in first.items]))
    if score == "groups":
        chances += [first.chance_of(label) for label in GROUP_LABELS]
    rows.append(("chance", *map(percent, (*chances, first.chance))))
    if first.benchmark.published if paper is None else paper:
        rows += _paper_rows(first.benchmark.name, subtasks)
    title = f"{first.benchmark.name}, {len(first.items)} questions, percent{_unread(evaluations)}"
    return Table(title, ("model", *subtasks, *_COLUMNS[score]), tuple(rows))


def _row(evaluation: ChoiceEvaluation, subtasks: Sequence[str]) -> tuple[str, ...]:
    numbers = [percent(number) for number in _numbers(evaluation, subtasks)]
    if evaluation.not_measured:
        numbers = ["not measured"] * len(numbers)
    return (evaluation.model, *numbers)


_COLUMNS: Mapping[Score, tuple[str, ...]] = {
    "pairs": ("questions", "pairs"),
    "tasks": ("questions", "mean of tasks"),
    "groups": ("answers", "questions", "images", "groups"),
}


def _numbers(evaluation: ChoiceEvaluation, subtasks: Sequence[str]) -> list[float]:
    """The numbers of a model's row, in the order of the columns."""
    results = evaluation.by_group()
    numbers = [results[name].mean for name in subtasks]
    numbers.append(evaluation.accuracy)
    if evaluation.benchmark.score == "groups":
        numbers += [evaluation.all_right(label) for label in GROUP_LABELS]
    return [*numbers, evaluation.overall]


def _unread(evaluations: Sequence[ChoiceEvaluation]) -> str:
    """Number of answers of each model that could not be read and count as wrong, if any."""
    counts = [
        f"{each.model} {each.unread} ({100 * each.unread_share:.1f} percent)"
        for each in evaluations
        if each.unread
    ]
    return f"; unread answers: {', '.join(counts)}" if counts else ""


def _paper_rows(name: str, subtasks: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows of the draft's tables 7 and 8, and of both tables of the later version."""
    if name not in _PUBLISHED:
        return []
    columns = _PUBLISHED[name]
    later = ("later-features", "later-fusion")
    rows = [row for table in later for row in published_table(table).beside(columns)]
    if name != "blink":
        draft = published_table("vqa").beside(columns) if name == "mmvp" else []
        blank = ["–"] * (len(subtasks) + 1)
        return [(head, *blank, *values) for head, *values in (*draft, *rows)]
    by_subtask = published_table("blink")
    whole = set(subtasks) == set(by_subtask.columns)
    means = [mean([v for v in row.values if v is not None]) for row in by_subtask.rows]
    draft = [
        (*row, "–", percent(overall) if whole else "–")
        for row, overall in zip(by_subtask.beside(tuple(subtasks)), means, strict=True)
    ]
    blank = ["–"] * (len(subtasks) + 1)
    return [*draft, *((head, *blank, value) for head, value in rows if whole)]


_PUBLISHED = {
    "mmvp": ("MMVP",),
    "blink": ("BLINK",),
    "naturalbench": ("NaturalBench Q", "NaturalBench I", "NaturalBench G"),
}


def _choice(item: ChoiceItem, answer: str, reader: Reader) -> Choice:
    read = reader(answer, item.options)
    index, rule = read or (None, None)
    return Choice(answer, index, rule, index == item.answer)


def _chance(evaluation: ChoiceEvaluation, group: str) -> float:
    return 100 * mean([1 / len(i.options) for i in evaluation.items if i.group == group])
