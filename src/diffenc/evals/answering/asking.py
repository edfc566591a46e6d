"""Ask a model everything that it has not answered yet."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image

from diffenc.errors import ConfigError, ImageError
from diffenc.evals.answering.base import Answerer, Query, check_answers, check_positive
from diffenc.evals.answering.records import Key, RecordsFile
from diffenc.evals.base import Problem, check_unique
from diffenc.evals.inspection import Progress, summary


class _Named(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=_Named)


@dataclass
class Asker:
    """Answers of one model: read from a file if they are in it, otherwise asked from the model.

    Attributes:
        model: Model that answers the questions.
        digests: Digest of each picture's content, by name of the picture.
        file: File that keeps the answers; None keeps them in memory alone.
        batch_size: Largest number of questions in one call of the model.
        progress: Function that is called with the number of answered questions of a part and the
            number of all of them; None reports nothing.
        skip_broken: Whether questions whose pictures can no longer be read are left out, instead of
            raising an error.
        fresh: Number of answers that the model gave in this run, not read from the file.
        broken: Reason why a question was left out, by id of the question.
    """

    model: Answerer
    digests: Mapping[str, str]
    file: RecordsFile | None = None
    batch_size: int = 8
    progress: Progress | None = None
    skip_broken: bool = False
    fresh: int = 0
    broken: dict[str, Problem] = field(default_factory=dict)
    _ids: set[str] = field(default_factory=set)

    def strangers(self) -> tuple[Problem, ...]:
        """Answers in the file to questions that were not asked here, as one problem each."""
        if self.file is None:
            return ()
        names = self.file.others(self.model.name, self._ids)
        return tuple(Problem("answers to questions that are not asked", name) for name in names)

    def ask(self, queries: Sequence[Query], *, part: str = "") -> dict[str, str]:
        """Ask questions and return the answers by id of the question, without those in `broken`.

        Args:
            queries: Questions to ask; either all or none of them have a prompt for the encoder.
            part: Name of the part of the protocol, such as "pass 2"; answers of different parts are
                kept apart.

        Raises:
            ConfigError: The file holds answers to other questions by these ids, two questions have
                the same, or some have a prompt and others none.
            ImageError: A picture that could be read before cannot be read any more.
            ShapeError: The model gives something else than one text per question.
            OutputError: The file cannot be written.
        """
        queries = [query for query in queries if query.id not in self.broken]
        if len({query.prompt is None for query in queries}) > 1:
            raise ConfigError("give all questions of a part a prompt for the encoder, or none")
        check_unique((query.id for query in queries), "the list of questions")
        self._ids.update(query.id for query in queries)
        found = {query.id: self._known(query, part) for query in queries}
        waiting = [query for query in queries if found[query.id] is None]
        self._tell(len(queries) - len(waiting), len(queries))
        for start in range(0, len(waiting), self.batch_size):
            batch = waiting[start : start + self.batch_size]
            shown = self._opened(batch)
            answers = self._answers(shown)
            for (query, _), answer in zip(shown, answers, strict=True):
                found[query.id] = answer
                self._keep(query, part, answer)
            self.fresh += len(shown)
            self._tell(len(queries) - len(waiting) + start + len(batch), len(queries))
        return {name: answer for name, answer in found.items() if answer is not None}

    def whole(self, items: Sequence[Item]) -> tuple[Item, ...]:
        """Items whose questions were not left out.

        Raises:
            ConfigError: There is none.
        """
        kept = tuple(item for item in items if item.id not in self.broken)
        if not kept:
            raise ConfigError(f"no question is left: {summary(self.broken.values())}")
        return kept

    def _opened(self, batch: Sequence[Query]) -> list[tuple[Query, list[Image.Image]]]:
        shown = []
        for query in batch:
            try:
                shown.append((query, [picture.open() for picture in query.pictures]))
            except ImageError as error:
                if not self.skip_broken:
                    raise
                detail = str(error).removeprefix("cannot read the image ")
                self.broken[query.id] = Problem("unreadable pictures", f"id {query.id}", detail)
        return shown

    def _answers(self, shown: Sequence[tuple[Query, list[Image.Image]]]) -> list[str]:
        if not shown:
            return []
        questions = [query.question for query, _ in shown]
        prompts = [query.prompt for query, _ in shown if query.prompt is not None] or None
        given = self.model.answer([images for _, images in shown], questions, prompts)
        return check_answers(given, len(shown), self.model.name)

    def _known(self, query: Query, part: str) -> str | None:
        if self.file is None:
            return None
        known = self.file.get(self._key(query, part), query.digest(self.digests))
        return None if known is None else str(known)

    def _keep(self, query: Query, part: str, answer: str) -> None:
        if self.file is not None:
            more = {"question": query.question}
            more |= {} if query.prompt is None else {"prompt": query.prompt}
            digest = query.digest(self.digests)
            self.file.add(self._key(query, part), digest, answer, **more)

    def _key(self, query: Query, part: str) -> Key:
        return self.model.name, part, query.id

    def _tell(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)


@contextmanager
def opened_asker(
    model: Answerer,
    digests: Mapping[str, str],
    results: "Path | None",
    *,
    task: str,
    source: str,
    batch_size: int,
    progress: Progress | None,
    skip_broken: bool = False,
) -> Iterator[Asker]:
    """An `Asker` on a file that is closed in the end, or on none.

    Raises:
        ConfigError: The file is of another task, or of another configuration of the model.
        OutputError: It cannot be read or written.
    """
    check_positive(batch_size=batch_size)
    if results is None:
        yield Asker(model, digests, None, batch_size, progress, skip_broken)
        return
    with RecordsFile(Path(results), task, source=source) as file:
        file.add_speaker(model.name, model.description)
        yield Asker(model, digests, file, batch_size, progress, skip_broken)
