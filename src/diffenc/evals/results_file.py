"""Scores of items on disk, one line each, so that an interrupted run goes on where it stopped."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from diffenc._version import __version__
from diffenc.errors import ConfigError, OutputError
from diffenc.evals.base import Benchmark, Matcher

_FORMAT = 1
_START = b'{"type": "benchmark"'

Key = tuple[str, int, str]
"""Name of the matcher, seed of the trial, id of the item."""


class ResultsFile:
    """JSON lines: what is scored, by whom, and the scores as they come.

    The first line describes the benchmark, one line each model, and every other line holds the
    scores of one item in one trial, `[[s(image 0, text 0), s(0, 1)], [s(1, 0), s(1, 1)]]`. Lines
    are appended whole; a last line that was torn by a crash is removed when the file is opened.

    Args:
        path: Of the file, which is made where it does not exist.
        benchmark: Whose items are scored.

    Raises:
        ConfigError: The file belongs to something else, or a line is broken.
        OutputError: It cannot be read or written.
    """

    def __init__(self, path: Path, benchmark: Benchmark) -> None:
        self.path = path
        self._models: dict[str, dict[str, Any]] = {}
        self._scores: dict[Key, tuple[str, list[Any]]] = {}
        header = {
            "type": "benchmark",
            "format": _FORMAT,
            "benchmark": benchmark.name,
            "template": benchmark.template,
        }
        try:
            self._read(header)
            self._file: IO[bytes] = path.open("ab")
        except OSError as error:
            raise OutputError(f"cannot use {path}: {error.strerror or error}") from error
        if self._file.tell() == 0:
            self._write({**header, "version": __version__, "source": benchmark.source})

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Bring everything to the disk."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def add_matcher(self, matcher: Matcher) -> None:
        """Note what a model's scores depend on.

        Raises:
            ConfigError: The file holds scores of another model or configuration by that name.
        """
        description = json.loads(json.dumps(dict(matcher.description)))
        known = self._models.get(matcher.name)
        if known is None:
            self._models[matcher.name] = description
            self._write({"type": "model", "name": matcher.name, "description": description})
        elif known != description:
            raise ConfigError(
                f"{self.path} holds scores of {matcher.name!r} in another configuration: "
                f"{'; '.join(differences(known, description))}. Take another file, or begin anew "
                "with --force"
            )

    def get(self, key: Key, digest: str) -> list[Any] | None:
        """The scores of an item, or None where it was not scored.

        Raises:
            ConfigError: The file holds scores of other pictures or captions by that id.
        """
        found = self._scores.get(key)
        if found is None:
            return None
        if found[0] != digest:
            raise ConfigError(
                f"{self.path} was made from other data: the pictures or captions of item "
                f"{key[2]!r} differ. Take another file, or begin anew with --force"
            )
        return found[1]

    def add(self, key: Key, digest: str, scores: list[Any]) -> None:
        """Append the scores of an item.

        Raises:
            OutputError: They cannot be written.
        """
        name, seed, item = key
        self._scores[key] = (digest, scores)
        line = {"type": "score", "model": name, "seed": seed, "item": item}
        self._write({**line, "digest": digest, "scores": scores})

    def _read(self, header: Mapping[str, Any]) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        whole, _, torn = content.rpartition(b"\n")
        if not whole and not (torn.startswith(_START) or _START.startswith(torn)):
            raise ConfigError(f"{self.path} is no results file of diffenc: take another name")
        lines = [self._parse(n, line) for n, line in enumerate(whole.split(b"\n"), 1) if whole]
        if lines:
            self._check_header(lines[0], header)
        for number, line in enumerate(lines[1:], start=2):
            self._take(number, line)
        if torn:
            with self.path.open("r+b") as file:
                file.truncate(len(content) - len(torn))

    def _check_header(self, first: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        there = {key: first.get(key) for key in header}
        if there["type"] != "benchmark":
            raise ConfigError(f"{self.path} is no results file of diffenc: take another name")
        if there != header:
            raise ConfigError(
                f"{self.path} holds results of another run: {'; '.join(differences(there, header))}"
                ". Take another file, or begin anew with --force"
            )

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
            if isinstance(value, dict):
                return value
        except ValueError:
            pass
        if number == 1:
            raise ConfigError(f"{self.path} is no results file of diffenc: take another name")
        raise ConfigError(
            f"line {number} of {self.path} is broken: {line[:60]!r}. Delete that line to score its "
            "item again, or begin anew with --force"
        )

    def _take(self, number: int, line: Mapping[str, Any]) -> None:
        try:
            if line["type"] == "model":
                self._models[line["name"]] = line["description"]
            else:
                key = (line["model"], line["seed"], line["item"])
                self._scores[key] = (line["digest"], line["scores"])
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"line {number} of {self.path} is broken: it lacks {error}. Delete that line to "
                "score its item again, or begin anew with --force"
            ) from error

    def _write(self, line: Mapping[str, Any]) -> None:
        content = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two JSON values differ: ``"config.timesteps is [189], was [189, 389]"``."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [
            line
            for key in keys
            if one.get(key) != other.get(key)
            for line in differences(one.get(key), other.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [f"{path} is {json.dumps(other)}, was {json.dumps(one)}"] if one != other else []
