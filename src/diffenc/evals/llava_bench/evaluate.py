"""Let a model answer, let a judge compare, and take the ratio of means."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffenc.errors import ConfigError
from diffenc.evals.answerers import Answerer
from diffenc.evals.asking import AnswerEvaluation, Asker, Query, asking
from diffenc.evals.inspection import Progress
from diffenc.evals.items import check_positive, digest_of
from diffenc.evals.llava_bench.data import CATEGORIES, BenchItem, LlavaBench
from diffenc.evals.llava_bench.judge import RULE, Case, Judge, JudgeError, read_scores
from diffenc.evals.paper import published_table
from diffenc.evals.tables import Table

_LONGEST = 60.0  # seconds between two attempts


@dataclass(frozen=True, slots=True)
class Review:
    """Review of an answer by a judge.

    Attributes:
        reference: Score of the reference answer, 1 to 10.
        candidate: Score of the model's answer, 1 to 10.
        reply: Whole reply of the judge.
    """

    reference: float
    candidate: float
    reply: str


@dataclass(frozen=True, kw_only=True)
class BenchEvaluation(AnswerEvaluation[BenchItem]):
    """Answers of a model and their reviews by a judge.

    Attributes:
        benchmark: Benchmark whose questions were asked.
        judge: Name of the judge; numbers of different judges do not compare.
        answers: Answer of the model to each item, by id.
        reviews: Review of each answer, by id; items whose review failed are missing, and count in
            no number.
        failures: Reason why the last attempt at a review failed, by id of the item.
    """

    benchmark: LlavaBench
    judge: str
    answers: Mapping[str, str]
    reviews: Mapping[str, Review]
    failures: Mapping[str, str]

    @property
    def complete(self) -> bool:
        """Whether every item has its review."""
        return not self.failures

    @property
    def unread_share(self) -> float:
        """Share of the answers whose review failed or holds no two scores, 0 to 1."""
        return len(self.failures) / len(self.items) if self.items else 0.0

    @property
    def overall(self) -> float | None:
        """100 x mean score of the answers / mean score of the references; None without reviews."""
        return self._ratio(None)

    def by_category(self) -> dict[str, float | None]:
        """Overall result per category; None for a category without reviews."""
        there = dict.fromkeys(item.category for item in self.items)
        order = [name for name in CATEGORIES if name in there]
        return {name: self._ratio(name) for name in (*order, *(n for n in there if n not in order))}

    def _ratio(self, category: str | None) -> float | None:
        reviews = [
            self.reviews[item.id]
            for item in self.items
            if item.id in self.reviews and category in (None, item.category)
        ]
        if not reviews:
            return None
        return 100 * sum(r.candidate for r in reviews) / sum(r.reference for r in reviews)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on data, judge and failures."""
        failed = [f"{name} ({why})" for name, why in list(self.failures.items())[:3]]
        failed += ["..."] if len(self.failures) > 3 else []
        lacking = (
            f"{len(self.failures)} of {len(self.items)} answers have no review and are in no "
            f"number ({100 * self.unread_share:.1f} percent): {', '.join(failed)}; the same call "
            "tries them again",
        )
        judge = f"judge {self.judge}; numbers of different judges do not compare"
        notes = (*super().notes, judge)
        return (*notes, *lacking) if self.failures else notes

    def to_dict(self) -> dict[str, Any]:
        """Every number, answer and review, as JSON holds it."""
        return {
            **super().to_dict(),
            "judge": self.judge,
            "overall": self.overall,
            "categories": self.by_category(),
            "complete": self.complete,
            "answers": dict(self.answers),
            "reviews": {name: asdict(review) for name, review in self.reviews.items()},
            "failures": dict(self.failures),
            "unread": len(self.failures),
            "unread_share": self.unread_share,
            "notes": list(self.notes),
        }


def evaluate_llava_bench(
    benchmark: LlavaBench,
    model: Answerer,
    judge: Judge,
    *,
    prompts: Callable[[BenchItem], str] | None = None,
    attempts: int = 5,
    wait: float = 2.0,
    results: "Path | None" = None,
    batch_size: int = 8,
    skip_broken: bool = False,
    progress: Progress | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> BenchEvaluation:
    """Ask every question once, and have every answer reviewed once.

    A review that fails, or that holds no two scores, is tried again after `wait`, 2 `wait`,
    4 `wait`... seconds, a minute at most. One that fails for good is never given a score: it is
    missing from the numbers, told, and tried again by the next call with the same results file.

    Args:
        benchmark: Questions and reference answers.
        model: Model that answers the questions.
        judge: Judge that compares the answers with the references.
        prompts: Function that makes the encoder's prompt of an item, `lambda item: item.question`
            for the paper's; None leaves the choice to the model.
        attempts: Largest number of attempts at each review, 1 or more.
        wait: Seconds to wait before the second attempt.
        results: JSON lines file that keeps answers and reviews; None keeps nothing.
        batch_size: Largest number of questions in one call of the model.
        skip_broken: Whether items whose picture cannot be read are left out, instead of raising an
            error.
        progress: Function that is called with the number of questions that are answered, then of
            answers that are reviewed, and the number of all of them; None reports nothing.
        sleep: Function that waits for a number of seconds.

    Raises:
        ConfigError: Broken items, a judge that refuses the request, or a results file of
            something else. What was answered and reviewed before is in the file.
        OutputError: The results file cannot be written.
        ShapeError: The model returns something else than one text per question.
    """
    check_positive(attempts=attempts)
    if model.name == judge.name:
        raise ConfigError(f"model and judge are both called {judge.name!r}; rename one of them")
    with asking(
        benchmark,
        model,
        results=results,
        batch_size=batch_size,
        skip_broken=skip_broken,
        progress=progress,
    ) as asker:
        answers = asker.ask(
            [
                Query(
                    *(item.id, item.pictures, item.question),
                    None if prompts is None else prompts(item),
                )
                for item in asker.items
            ]
        )
        reviewer = _Reviewer(judge, asker, attempts, wait, sleep)
        for done, item in enumerate(asker.items, start=1):
            reviewer.review(item, _case(item, answers[item.id], benchmark))
            if progress is not None:
                progress(done, len(asker.items))
    facts = asker.facts()
    facts["fresh"] += reviewer.fresh
    return BenchEvaluation(
        benchmark=benchmark,
        judge=judge.name,
        answers=answers,
        reviews=reviewer.reviews,
        failures=reviewer.failures,
        **facts,
    )


class _Reviewer:
    """Reviews of one model's answers by one judge, from the file or asked for."""

    def __init__(
        self,
        judge: Judge,
        asker: Asker[BenchItem],
        attempts: int,
        wait: float,
        sleep: Callable[[float], object],
    ) -> None:
        self.reviews: dict[str, Review] = {}
        self.failures: dict[str, str] = {}
        self.fresh = 0
        self._judge, self._model, self._file = judge, asker.model.name, asker.file
        self._attempts, self._wait, self._sleep = attempts, wait, sleep
        if self._file is not None:
            self._file.add_model(judge.name, judge.description)

    def review(self, item: BenchItem, case: Case) -> None:
        """Take the review from the file, or ask for one."""
        key = (self._judge.name, f"review of {self._model}", item.id)
        digest = digest_of(case.prompt)
        reply = self._file.get(key, digest) if self._file else None
        if not isinstance(reply, str) or not _is_read(reply):  # earlier rules read other replies
            reply = self._ask(item, case)
            if reply is None:
                return
            self.fresh += 1
            if self._file:
                self._file.add(key, digest, reply)
        self.reviews[item.id] = Review(*read_scores(reply), reply)

    def _ask(self, item: BenchItem, case: Case) -> str | None:
        """A reply that holds two scores, or None after the last attempt."""
        for attempt in range(self._attempts):
            if attempt:
                self._sleep(min(_LONGEST, self._wait * 2 ** (attempt - 1)))
            try:
                reply = self._judge.review(case)
                read_scores(reply)
            except JudgeError as error:
                self.failures[item.id] = str(error)
            else:
                self.failures.pop(item.id, None)
                return reply
        return None


def _is_read(reply: str) -> bool:
    try:
        read_scores(reply)
    except JudgeError:
        return False
    return True


def bench_table(evaluations: Sequence[BenchEvaluation], *, paper: bool | None = None) -> Table:
    """Make a table with one row per model, and one column per category and for all of them.

    Args:
        evaluations: Evaluations of the same questions, by the same judge.
        paper: Whether the paper's rows are added; None adds them unless the items are miniatures.
    """
    first = evaluations[0]
    categories = tuple(first.by_category())
    columns = (*categories, "all")
    rows = []
    for each in evaluations:
        ratios = {**each.by_category(), "all": each.overall}
        cells = ("–" if ratios.get(c) is None else f"{ratios[c]:.1f}" for c in columns)
        reviewed = "" if each.complete else f" ({len(each.reviews)} of {len(each.items)} reviewed)"
        rows.append((f"{each.model}{reviewed}", *cells))
    if first.benchmark.published if paper is None else paper:
        rows += published_table("vqa").beside(columns)
    title = (
        f"{first.benchmark.name}, {len(first.items)} questions, judge {first.judge}: 100 x mean "
        "score / mean score of the reference"
    )
    return Table(title, ("model", *columns), tuple(rows))


def _case(item: BenchItem, answer: str, benchmark: LlavaBench) -> Case:
    rule, role = benchmark.rules.get(item.category, (RULE, "Assistant"))
    if item.category not in benchmark.rules:
        rule = rule.format(role=role)
    return Case(item.context, item.question, item.reference, answer.strip(), rule, role)
