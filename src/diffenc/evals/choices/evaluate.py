"""Ask a model questions with options, read its answers, and count."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffenc._version import __version__
from diffenc.evals.answering.asking import opened_asker
from diffenc.evals.answering.base import Answerer, Query
from diffenc.evals.answering.paper import PublishedTable, published_table
from diffenc.evals.answering.pictures import left_out, whole_items
from diffenc.evals.base import Problem
from diffenc.evals.choices.base import ChoiceBenchmark, ChoiceItem
from diffenc.evals.choices.extraction import Rule, extract_choice
from diffenc.evals.inspection import Progress
from diffenc.evals.metrics import Result
from diffenc.evals.report import Table, percent

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


@dataclass(frozen=True)
class ChoiceEvaluation:
    """Answers of a model to a benchmark.

    Attributes:
        model: Name of the model, as it appears in the report.
        description: Everything that the answers depend on, as JSON values.
        benchmark: Benchmark whose questions were asked.
        items: Items that could be asked.
        choices: Answer of the model to each item and how it was read, by id of the item.
        problems: Reasons why other items were left out.
        fresh: Number of questions that were asked in this run; the others were answered in the
            results file.
    """

    model: str
    description: Mapping[str, Any]
    benchmark: ChoiceBenchmark
    items: tuple[ChoiceItem, ...]
    choices: Mapping[str, Choice]
    problems: tuple[Problem, ...] = ()
    fresh: int = field(default=0, compare=False)

    @property
    def overall(self) -> float:
        """The benchmark's own number, in percent: of pairs, or the mean over tasks."""
        groups = self.by_group()
        if self.benchmark.score == "tasks":
            return _mean([result.mean for result in groups.values()])
        return _mean([100.0 * (result.mean == 100) for result in groups.values()])

    @property
    def accuracy(self) -> float:
        """Percentage of single questions that are answered rightly."""
        return _mean([100.0 * self.choices[item.id].right for item in self.items])

    @property
    def chance(self) -> float:
        """Overall result that independent guesses reach on average, in percent."""
        groups: dict[str, list[float]] = {}
        for item in self.items:
            groups.setdefault(item.group, []).append(1 / len(item.options))
        if self.benchmark.score == "tasks":
            return 100 * _mean([_mean(each) for each in groups.values()])
        return 100 * _mean([_product(each) for each in groups.values()])

    @property
    def unread(self) -> int:
        """Number of answers that mean no single option."""
        return sum(self.choices[item.id].index is None for item in self.items)

    @property
    def unread_share(self) -> float:
        """Share of the answers that mean no single option, 0 to 1."""
        return self.unread / len(self.items) if self.items else 0.0

    def by_group(self) -> dict[str, Result]:
        """Accuracy of each pair or task, in the benchmark's order."""
        found: dict[str, list[bool]] = {}
        for item in self.items:
            found.setdefault(item.group, []).append(self.choices[item.id].right)
        order = [*(name for name in self.benchmark.groups if name in found)]
        order += [name for name in found if name not in order]
        return {name: Result((100 * _mean(found[name]),), len(found[name])) for name in order}

    def by_label(self, kind: str) -> dict[str, float]:
        """The benchmark's own number over the items of each label of a kind."""
        labels = dict.fromkeys(item.labels[kind] for item in self.items if kind in item.labels)
        return {label: self._of(kind, label).overall for label in labels}

    def _of(self, kind: str, label: str) -> "ChoiceEvaluation":
        items = tuple(item for item in self.items if item.labels.get(kind) == label)
        return ChoiceEvaluation(self.model, {}, self.benchmark, items, self.choices)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on data, on how answers were read, and on items that were left out."""
        rules = Counter(choice.rule for choice in self.choices.values() if choice.rule)
        read = ", ".join(f"{rule} {count}" for rule, count in rules.most_common())
        said = (
            f"answers read by {read or 'no rule'}; {self.unread} unread, which count as wrong "
            f"({100 * self.unread_share:.1f} percent of {len(self.items)})"
        )
        return (*left_out(self.problems), *self.benchmark.notes, said)

    def to_dict(self) -> dict[str, Any]:
        """Every number and answer, as JSON holds it."""
        return {
            "version": __version__,
            "benchmark": self.benchmark.name,
            "source": self.benchmark.source,
            "score": self.benchmark.score,
            "items": len(self.items),
            "model": self.model,
            "description": dict(self.description),
            "overall": self.overall,
            "accuracy": self.accuracy,
            "chance": self.chance,
            "unread": self.unread,
            "unread_share": self.unread_share,
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
    """
    keep = _whole_pairs if benchmark.score == "pairs" else tuple
    items, reading = whole_items(
        benchmark.items,
        lambda item: item.pictures,
        source=benchmark.source,
        problems=benchmark.problems,
        skip_broken=skip_broken,
        otherwise="question that can be asked",
        keep=keep,
    )
    queries = [
        Query(item.id, item.pictures, item.text, None if prompts is None else prompts(item))
        for item in items
    ]
    with opened_asker(
        model,
        reading.digests,
        results,
        task=benchmark.name,
        source=benchmark.source,
        batch_size=batch_size,
        progress=progress,
        skip_broken=skip_broken,
    ) as asker:
        answers = asker.ask(queries)
        items = tuple(keep(asker.whole(items)))
    return ChoiceEvaluation(
        model=model.name,
        description=dict(model.description),
        benchmark=benchmark,
        items=items,
        choices={item.id: _choice(item, answers[item.id], reader) for item in items},
        problems=(*reading.problems, *asker.broken.values(), *asker.strangers()),
        fresh=asker.fresh,
    )


def _whole_pairs(items: Sequence[ChoiceItem]) -> list[ChoiceItem]:
    sizes = Counter(item.group for item in items)
    return [item for item in items if sizes[item.group] == 2]


def choice_table(evaluations: Sequence[ChoiceEvaluation], *, paper: bool | None = None) -> Table:
    """Make a table of models: accuracy of tasks and single questions, and the overall result.

    Args:
        evaluations: Evaluations of the same benchmark.
        paper: Whether the paper's rows are added; None adds them unless the items are miniatures.
    """
    first = evaluations[0]
    name, tasks = first.benchmark.name, first.benchmark.score == "tasks"
    groups = tuple(first.by_group()) if tasks else ()
    own = "mean of tasks" if tasks else "pairs"
    columns = (*groups, "questions", own)
    rows = []
    for each in evaluations:
        found = each.by_group()
        cells = [percent(found[group].mean) for group in groups]
        rows.append((each.model, *cells, percent(each.accuracy), percent(each.overall)))
    chances = [_chance(first, group) for group in groups]
    questions = 100 * _mean([1 / len(item.options) for item in first.items])
    rows.append(("chance", *map(percent, chances), percent(questions), percent(first.chance)))
    if first.benchmark.expected is not None if paper is None else paper:
        rows += _paper_rows(published_table("vqa"), name, groups)
    title = f"{name}, {len(first.items)} questions, percent{_unread(evaluations)}"
    return Table(title, ("model", *columns), tuple(rows))


def _unread(evaluations: Sequence[ChoiceEvaluation]) -> str:
    """Number of answers of each model that could not be read and count as wrong, if any."""
    counts = [
        f"{each.model} {each.unread} ({100 * each.unread_share:.1f} percent)"
        for each in evaluations
        if each.unread
    ]
    return f"; unread answers: {', '.join(counts)}" if counts else ""


def _paper_rows(table: PublishedTable, name: str, groups: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows of table 8 by task, with the mean of each; of table 7 for MMVP."""
    if groups:
        by_task = published_table("blink")
        rows = by_task.beside(tuple(groups))
        whole = set(groups) == set(by_task.columns)
        means = [_mean([v for v in row.values if v is not None]) for row in by_task.rows]
        own = [percent(mean) if whole else "–" for mean in means]
        return [(*row, "–", mean) for row, mean in zip(rows, own, strict=True)]
    column = {"mmvp": "MMVP"}.get(name, name)
    return [(head, "–", value) for head, value in table.beside((column,))]


def _choice(item: ChoiceItem, answer: str, reader: Reader) -> Choice:
    read = reader(answer, item.options)
    index, rule = read or (None, None)
    return Choice(answer, index, rule, index == item.answer)


def _chance(evaluation: ChoiceEvaluation, group: str) -> float:
    return 100 * _mean([1 / len(i.options) for i in evaluation.items if i.group == group])


def _product(values: Sequence[float]) -> float:
    found = 1.0
    for value in values:
        found *= value
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
