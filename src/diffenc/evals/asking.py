"""Ask a model everything that it has not answered yet."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from PIL import Image

from diffenc._version import __version__
from diffenc.errors import ConfigError, ImageError
from diffenc.evals.answerers import Answerer, check_answers
from diffenc.evals.inspection import Progress, Reading, left_out, summary, unreadable, whole_items
from diffenc.evals.items import (
    Benchmark,
    ItemT,
    Picture,
    Problem,
    check_positive,
    check_unique,
    digest_of,
)
from diffenc.evals.records import ANSWERS, RecordsFile


@dataclass(frozen=True, slots=True)
class Query:
    """One question to a model.

    Attributes:
        id: Id of the question, unique in its benchmark.
        pictures: Pictures that the question is about, one or several.
        question: Text for the language model.
        prompt: Text for the vision encoder; None leaves the choice to the model.
    """

    id: str
    pictures: Sequence[Picture]
    question: str
    prompt: str | None = None

    def digest(self, picture_digests: Mapping[str, str]) -> str:
        """Return a digest of everything that the answer is made from."""
        pictures = [picture_digests[picture.name] for picture in self.pictures]
        return digest_of([self.question, self.prompt, *pictures])


@dataclass
class Asker(Generic[ItemT]):
    """Answers of one model: read from a file if they are in it, otherwise asked from the model.

    Attributes:
        model: Model that answers the questions.
        items: Items whose questions can be asked; those that break on the way leave.
        reading: Digests of the pictures, and what was broken before the first question.
        file: File that keeps the answers; None keeps them in memory alone.
        batch_size: Largest number of questions in one call of the model.
        progress: Function that is called with the number of answered questions of a part and the
            number of all of them; None reports nothing.
        skip_broken: Whether questions whose pictures can no longer be read are left out, instead of
            raising an error.
        keep: Function that selects the items that count among those that are whole.
        fresh: Number of answers that the model gave in this run, not read from the file.
        broken: Reason why a question was left out, by id of the question.
    """

    model: Answerer
    items: tuple[ItemT, ...]
    reading: Reading
    file: RecordsFile | None = None
    batch_size: int = 8
    progress: Progress | None = None
    skip_broken: bool = False
    keep: Callable[[Sequence[ItemT]], Sequence[ItemT]] = tuple
    fresh: int = 0
    broken: dict[str, Problem] = field(default_factory=dict)
    _ids: set[str] = field(default_factory=set)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What was left out before and on the way, and answers in the file that nobody asks for."""
        names = self.file.others(self.model.name, self._ids) if self.file else ()
        strangers = (Problem("answers to questions that are not asked", name) for name in names)
        return (*self.reading.problems, *self.broken.values(), *strangers)

    def facts(self) -> dict[str, Any]:
        """Fields that every `AnswerEvaluation` of this run has, beside its benchmark."""
        return {
            "model": self.model.name,
            "description": dict(self.model.description),
            "items": self.items,
            "problems": self.problems,
            "fresh": self.fresh,
        }

    def ask(self, queries: Sequence[Query], *, part: str = "") -> dict[str, str]:
        """Ask questions and return the answers by id of the question, without those in `broken`.

        Args:
            queries: Questions to ask; either all or none of them have a prompt for the encoder.
            part: Name of the part of the protocol, such as "pass 2"; answers of different parts are
                kept apart.

        Raises:
            ConfigError: The file holds answers to other questions by these ids, two questions have
                the same, some have a prompt and others none, or no question is left.
            ImageError: A picture that could be read before cannot be read any more.
            ShapeError: The model gives something else than one text per question.
            OutputError: The file cannot be written.
        """
        queries = [query for query in queries if query.id not in self.broken]
        if len({query.prompt is None for query in queries}) > 1:
            raise ConfigError("give all questions of a part a prompt for the encoder, or none")
        check_unique((query.id for query in queries), "the list of questions")
        self._ids.update(query.id for query in queries)
        answers = {query.id: self._known(query, part) for query in queries}
        waiting = [query for query in queries if answers[query.id] is None]
        self._report(len(queries) - len(waiting), len(queries))
        for start in range(0, len(waiting), self.batch_size):
            batch = waiting[start : start + self.batch_size]
            opened = self._opened(batch)
            for (query, _), answer in zip(opened, self._answers(opened), strict=True):
                answers[query.id] = answer
                self._write(query, part, answer)
            self.fresh += len(opened)
            self._report(len(queries) - len(waiting) + start + len(batch), len(queries))
        self._leave_broken_out()
        return {name: answer for name, answer in answers.items() if answer is not None}

    def _leave_broken_out(self) -> None:
        whole = [item for item in self.items if item.id not in self.broken]
        self.items = tuple(self.keep(whole))
        if not self.items:
            raise ConfigError(f"no question is left: {summary(self.broken.values())}")

    def _opened(self, batch: Sequence[Query]) -> list[tuple[Query, list[Image.Image]]]:
        opened = []
        for query in batch:
            try:
                opened.append((query, [picture.open() for picture in query.pictures]))
            except ImageError as error:
                if not self.skip_broken:
                    raise
                self.broken[query.id] = unreadable(f"id {query.id}", error)
        return opened

    def _answers(self, opened: Sequence[tuple[Query, list[Image.Image]]]) -> list[str]:
        if not opened:
            return []
        questions = [query.question for query, _ in opened]
        prompts = [query.prompt for query, _ in opened if query.prompt is not None] or None
        answers = self.model.answer([images for _, images in opened], questions, prompts)
        return check_answers(answers, len(opened), self.model.name)

    def _known(self, query: Query, part: str) -> str | None:
        if self.file is None:
            return None
        key = (self.model.name, part, query.id)
        known = self.file.get(key, query.digest(self.reading.digests))
        return None if known is None else str(known)

    def _write(self, query: Query, part: str, answer: str) -> None:
        if self.file is not None:
            more = {"question": query.question}
            more |= {} if query.prompt is None else {"prompt": query.prompt}
            key = (self.model.name, part, query.id)
            self.file.add(key, query.digest(self.reading.digests), answer, **more)

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)


@contextmanager
def asking(
    benchmark: Benchmark[ItemT],
    model: Answerer,
    *,
    results: "Path | None",
    batch_size: int,
    skip_broken: bool,
    progress: Progress | None,
    protocol: str = "",
    lacking: str = "question that can be asked",
    keep: Callable[[Sequence[ItemT]], Sequence[ItemT]] = tuple,
) -> Iterator[Asker[ItemT]]:
    """Look at all pictures, then give an `Asker` on a file that is closed in the end, or on none.

    Args:
        benchmark: Benchmark whose items are asked about.
        model: Model that answers.
        results: JSON lines file that keeps the answers; None keeps nothing.
        batch_size: Largest number of questions in one call of the model.
        skip_broken: Whether broken items are left out, instead of raising an error.
        progress: Function that is called with the number of answers of a part and the number of all
            of them; None reports nothing.
        protocol: What is asked, written into the file and compared; "" is the benchmark's name.
        lacking: Description of what is missing if no item can be read, for the error message.
        keep: Function that selects the items that count among those that are whole.

    Raises:
        ConfigError: Broken items, or a file of another task or configuration of the model.
        OutputError: The file cannot be read or written.
    """
    check_positive(batch_size=batch_size)
    items, reading = whole_items(benchmark, skip_broken=skip_broken, lacking=lacking, keep=keep)
    options = (batch_size, progress, skip_broken, keep)
    if results is None:
        yield Asker(model, items, reading, None, *options)
        return
    header = {"task": protocol or benchmark.name}
    with RecordsFile(Path(results), ANSWERS, header, source=benchmark.source) as file:
        file.add_model(model.name, model.description)
        yield Asker(model, items, reading, file, *options)


@dataclass(frozen=True, kw_only=True)
class AnswerEvaluation(Generic[ItemT]):
    """Answers of a model to a benchmark; each kind of benchmark adds its numbers.

    Attributes:
        model: Name of the model, as it appears in the report.
        description: Everything that the answers depend on, as JSON values.
        benchmark: Benchmark whose questions were asked.
        items: Items that could be asked.
        problems: Reasons why other items were left out.
        fresh: Number of answers that are new; the others were in the results file.
    """

    model: str
    description: Mapping[str, Any]
    benchmark: Benchmark[ItemT]
    items: tuple[ItemT, ...]
    problems: tuple[Problem, ...] = ()
    fresh: int = field(default=0, compare=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on what was left out, and on the data."""
        return (*left_out(self.problems), *self.benchmark.notes)

    def to_dict(self) -> dict[str, Any]:
        """What was measured, as JSON holds it."""
        return {
            "version": __version__,
            "benchmark": self.benchmark.name,
            "source": self.benchmark.source,
            "items": len(self.items),
            "model": self.model,
            "description": dict(self.description),
        }
