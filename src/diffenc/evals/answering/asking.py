"""Ask a model everything that it has not answered yet."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffenc.errors import ConfigError
from diffenc.evals.answering.base import Answerer, Query, check_answers, check_positive
from diffenc.evals.answering.records import Key, RecordsFile
from diffenc.evals.inspection import Progress


@dataclass
class Asker:
    """Answers of one model, from a file where they are in it, from the model where not.

    Attributes:
        model: Who answers.
        digests: Of the pictures, by name.
        file: Where answers are kept; None keeps them in memory alone.
        batch_size: Most questions in one call of the model.
        progress: Told how many questions of a part are answered.
        fresh: How many answers were asked for now.
    """

    model: Answerer
    digests: Mapping[str, str]
    file: RecordsFile | None = None
    batch_size: int = 8
    progress: Progress | None = None
    fresh: int = 0

    def ask(self, queries: Sequence[Query], *, part: str = "") -> dict[str, str]:
        """The answers by id of the question.

        Args:
            queries: All with a prompt for the encoder, or all without.
            part: Of the protocol, such as "pass 2"; answers of different parts stand side by side.

        Raises:
            ConfigError: The file holds answers to other questions by these ids, or some questions
                have a prompt and others none.
            ShapeError: The model gives something else than one text per question.
            OutputError: The file cannot be written.
        """
        if len({query.prompt is None for query in queries}) > 1:
            raise ConfigError("give all questions of a part a prompt for the encoder, or none")
        found = {query.id: self._known(query, part) for query in queries}
        waiting = [query for query in queries if found[query.id] is None]
        self._tell(len(queries) - len(waiting), len(queries))
        for start in range(0, len(waiting), self.batch_size):
            batch = waiting[start : start + self.batch_size]
            images = [[picture.open() for picture in query.pictures] for query in batch]
            questions = [query.question for query in batch]
            prompts = [query.prompt for query in batch if query.prompt is not None] or None
            given = self.model.answer(images, questions, prompts)
            answers = check_answers(given, len(batch), self.model.name)
            for query, answer in zip(batch, answers, strict=True):
                found[query.id] = answer
                self._keep(query, part, answer)
            self.fresh += len(batch)
            self._tell(len(queries) - len(waiting) + start + len(batch), len(queries))
        return {name: answer for name, answer in found.items() if answer is not None}

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
) -> Iterator[Asker]:
    """An `Asker` on a file that is closed in the end, or on none.

    Raises:
        ConfigError: The file is of another task, or of another configuration of the model.
        OutputError: It cannot be read or written.
    """
    check_positive(batch_size=batch_size)
    if results is None:
        yield Asker(model, digests, None, batch_size, progress)
        return
    with RecordsFile(Path(results), task, source=source) as file:
        file.add_speaker(model.name, model.description)
        yield Asker(model, digests, file, batch_size, progress)
