"""Answers and their reviews on disk, one line each, so that nothing is asked twice."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from diffenc._version import __version__
from diffenc.errors import ConfigError, OutputError
from diffenc.evals.results_file import differences

_FORMAT = 1
_START = b'{"type": "answers"'

Key = tuple[str, str, str]
"""Who said it, in which part of the protocol, on which item."""


class RecordsFile:
    """JSON lines: the task, who answers, and every answer as it comes.

    The first line describes the task, one line each model (or judge), and every other line holds
    one answer, or one review of an answer. Lines are appended whole; a last line that was torn by
    a crash is removed when the file is opened. What an answer was made from is kept as a digest:
    an answer to another question, prompt or picture is never taken for this one.

    Args:
        path: Of the file, which is made where it does not exist.
        task: Name of the benchmark or protocol.
        source: Where items come from; told, not compared.

    Raises:
        ConfigError: The file belongs to something else, or a line is broken.
        OutputError: It cannot be read or written.
    """

    def __init__(self, path: Path, task: str, *, source: str = "") -> None:
        self.path = path
        self._speakers: dict[str, Any] = {}
        self._values: dict[Key, tuple[str, Any]] = {}
        header = {"type": "answers", "format": _FORMAT, "task": task}
        try:
            self._read(header)
            self._file: IO[bytes] = path.open("ab")
        except OSError as error:
            raise OutputError(f"cannot use {path}: {error.strerror or error}") from error
        if self._file.tell() == 0:
            self._write({**header, "version": __version__, "source": source})

    def __enter__(self) -> "RecordsFile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def add_speaker(self, name: str, description: Mapping[str, Any]) -> None:
        """Note what the answers of a model, or the reviews of a judge, depend on.

        Raises:
            ConfigError: The file holds those of another one by that name.
        """
        plain = json.loads(json.dumps(dict(description)))
        known = self._speakers.get(name)
        if known is None:
            self._speakers[name] = plain
            self._write({"type": "model", "name": name, "description": plain})
        elif known != plain:
            raise ConfigError(
                f"{self.path} holds answers of {name!r} in another configuration: "
                f"{'; '.join(differences(known, plain))}. Take another file, or another name"
            )

    def get(self, key: Key, digest: str) -> Any:
        """What was said, or None where nothing was yet.

        Raises:
            ConfigError: The file holds an answer by that key to something else.
        """
        found = self._values.get(key)
        if found is None:
            return None
        if found[0] != digest:
            raise ConfigError(
                f"{self.path} was made from other data: the question, prompt or pictures of item "
                f"{key[2]!r} differ. Take another file"
            )
        return found[1]

    def add(self, key: Key, digest: str, value: Any, **more: Any) -> None:
        """Append what was said; `more` is for readers of the file.

        Raises:
            OutputError: It cannot be written.
        """
        self._values[key] = (digest, value)
        line = {"type": "answer", "model": key[0], "part": key[1], "item": key[2]}
        self._write({**line, "digest": digest, **more, "answer": value})

    def _read(self, header: Mapping[str, Any]) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        whole, _, torn = content.rpartition(b"\n")
        if not whole and not (torn.startswith(_START) or _START.startswith(torn)):
            raise ConfigError(f"{self.path} holds no answers: take another name")
        lines = [self._parse(n, line) for n, line in enumerate(whole.split(b"\n"), 1) if whole]
        if lines and (there := {key: lines[0].get(key) for key in header}) != header:
            if there["type"] != "answers":
                raise ConfigError(f"{self.path} holds no answers: take another name")
            raise ConfigError(
                f"{self.path} belongs to another run: {'; '.join(differences(there, header))}. "
                "Take another file"
            )
        for number, line in enumerate(lines[1:], start=2):
            self._take(number, line)
        if torn:
            with self.path.open("r+b") as file:
                file.truncate(len(content) - len(torn))

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            if number == 1:
                raise ConfigError(f"{self.path} holds no answers: take another name")
            raise ConfigError(
                f"line {number} of {self.path} is broken: {line[:60]!r}. Delete that line to ask "
                "its question again"
            )
        return value

    def _take(self, number: int, line: Mapping[str, Any]) -> None:
        try:
            if line["type"] == "model":
                self._speakers[line["name"]] = line["description"]
            else:
                key = (line["model"], line["part"], line["item"])
                self._values[key] = (line["digest"], line["answer"])
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"line {number} of {self.path} is broken: it lacks {error}. Delete that line to "
                "ask its question again"
            ) from error

    def _write(self, line: Mapping[str, Any]) -> None:
        content = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error
