"""Scores and answers on disk, one line each, so that nothing is computed or asked twice."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from diffenc._version import __version__
from diffenc.config import check_choice
from diffenc.errors import ConfigError, DiffencError, OutputError
from diffenc.storage.names import is_file
from diffenc.storage.reading import DATA_BYTES, decode, parse_json, read_bytes
from diffenc.storage.schema import checked
from diffenc.storage.writing import locked, reporting

# `Self` is not known to the check of annotations at run time (make test-shapes).
_File = TypeVar("_File", bound="RecordsFile")

_NONE = object()

_AGAIN = "again"
"""Key of a line that replaces an earlier one; any other second line is a copy."""

_INSTEAD = "Take another file, or begin anew with --force"
_INSTEAD_OF_NAME = "Take another file or another name, or begin anew with --force"

Key = tuple[str, int | str, str]
"""Name of the model, trial or part of the protocol, id of the item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordKind:
    """What a kind of file holds.

    Attributes:
        header: Type of the first line.
        line: Type of the lines that hold values.
        part: Name under which a line holds the middle part of its key.
        part_type: Type of that part.
        value: Name under which a line holds its value.
        value_type: Type of the values.
        plural: Noun for the values of a model, in the plural.
        made_from: Noun phrase for the data that values are made from.
        check: Function that refuses values of that type that are none of this kind.
    """

    header: str
    line: str
    part: str
    part_type: type
    value: str
    value_type: Any
    plural: str
    made_from: str
    check: Callable[[Any], None] = lambda value: None

    @property
    def keys(self) -> tuple[str, str, str]:
        """Names under which a line holds the three parts of its key."""
        return ("model", self.part, "item")


def _check_scores(scores: Any) -> None:
    if len(scores) != 2 or any(len(row) != 2 for row in scores):
        raise ConfigError(f"scores must be of two pictures and two captions, got {scores}")
    if len({len(parts) for row in scores for parts in row if isinstance(parts, list)}) > 1:
        raise ConfigError(f"scores must all have as many parts, got {scores}")


SCORES = RecordKind(
    header="benchmark",
    line="score",
    part="seed",
    part_type=int,
    value="scores",
    value_type=list[list[float]] | list[list[list[float]]],
    plural="scores",
    made_from="the pictures or captions",
    check=_check_scores,
)
"""Scores `[[s(image 0, text 0), s(0, 1)], [s(1, 0), s(1, 1)]]` of an item in one trial."""

ANSWERS = RecordKind(
    header="answers",
    line="answer",
    part="part",
    part_type=str,
    value="answer",
    value_type=str,
    plural="answers",
    made_from="the question, prompt or pictures",
)
"""Answers of a model, or a judge's reviews of them, by part of the protocol."""


class RecordsFile:
    """JSON lines: what is measured, by whom, and every value as it comes.

    The first line describes the task, one line each model, and every other line holds one value. A
    digest says what a value was made from, so that it is never taken for another. Lines are
    appended whole; a last line that was torn by a crash is removed when the file is opened. While
    one program has the file open, no other one opens it.

    Args:
        path: Path of the file, which is created if it does not exist.
        kind: What the file holds: `SCORES` or `ANSWERS`.
        header: Facts that must equal those of an existing file for its values to be reused.
        source: Origin of the items; written into the file, not compared.

    Raises:
        ConfigError: The file belongs to something else, or a line is broken or a copy.
        OutputError: It cannot be read or written, or another program has it open.
    """

    def __init__(
        self, path: Path, kind: RecordKind, header: Mapping[str, Any], *, source: str = ""
    ) -> None:
        self.path, self.kind = path, kind
        self._models: dict[str, Any] = {}
        self._values: dict[Key, tuple[str, Any]] = {}
        header = {"type": kind.header, "format": 1, **header}
        with ExitStack() as stack:
            stack.enter_context(locked(path.parent, name=path.name, purpose="writing to it"))
            self._read(header)
            with reporting(path):
                self._file: IO[bytes] = stack.enter_context(path.open("ab"))
            if self._file.tell() == 0:
                self._write({**header, "version": __version__, "source": source})
            self._open = stack.pop_all()

    def __enter__(self: _File) -> _File:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Bring everything to the disk."""
        with self._open:
            if not self._file.closed:
                with reporting(self.path):
                    os.fsync(self._file.fileno())

    def get(self, key: Key, digest: str) -> Any:
        """The value by that key, or None where there is none yet.

        Raises:
            ConfigError: The file holds one that was made from something else.
        """
        entry = self._values.get(key)
        if entry is None:
            return None
        if entry[0] != digest:
            raise ConfigError(
                f"{self.path} was made from other data: {self.kind.made_from} of item "
                f"{key[2]!r} differ. {_INSTEAD}"
            )
        return entry[1]

    def add(self, key: Key, digest: str, value: Any, **more: Any) -> None:
        """Append a value, which takes the place of one by that key; `more` is for readers.

        Raises:
            OutputError: It cannot be written.
        """
        again = {_AGAIN: True} if key in self._values else {}
        self._values[key] = (digest, value)
        line = {"type": self.kind.line, **dict(zip(self.kind.keys, key, strict=True))}
        self._write({**line, **again, "digest": digest, **more, self.kind.value: value})

    def others(self, model: str, items: Collection[str]) -> list[str]:
        """Items for which the file holds values of a model, other than these."""
        there = (item for name, _, item in self._values if name == model and item not in items)
        return list(dict.fromkeys(there))

    def add_model(self, name: str, description: Mapping[str, Any]) -> None:
        """Note what a model's values depend on.

        Raises:
            ConfigError: The file holds values of another model or configuration by that name.
        """
        plain = parse_json(json.dumps(dict(description)), where=f"the description of {name}")
        known = self._models.get(name)
        if known is None and any(model == name for model, _, _ in self._values):
            raise ConfigError(
                f"{self.path} holds {self.kind.plural} of {name!r}, but no line says of which "
                f"configuration. {_INSTEAD_OF_NAME}"
            )
        if known is None:
            self._models[name] = plain
            self._write({"type": "model", "name": name, "description": plain})
        elif known != plain:
            raise ConfigError(
                f"{self.path} holds {self.kind.plural} of {name!r} in another configuration: "
                f"{'; '.join(differences(known, plain))}. {_INSTEAD_OF_NAME}"
            )

    def _read(self, header: Mapping[str, Any]) -> None:
        there = is_file(self.path)
        content = read_bytes(self.path, error=OutputError, most=DATA_BYTES) if there else b""
        whole, _, torn = content.rpartition(b"\n")
        start = f'{{"type": "{self.kind.header}"'.encode()
        if not whole and not (torn.startswith(start) or start.startswith(torn)):
            raise self._foreign()
        lines = [self._parse(n, line) for n, line in enumerate(whole.split(b"\n"), 1) if whole]
        if lines:
            self._check_header(lines[0], header)
        for number, line in enumerate(lines[1:], start=2):
            self._take(number, line)
        if torn:
            with reporting(self.path), self.path.open("r+b") as file:
                file.truncate(len(content) - len(torn))

    def _check_header(self, first: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        there = {key: first.get(key) for key in header}
        if there["type"] != header["type"]:
            raise self._foreign()
        if there != header:
            raise ConfigError(
                f"{self.path} belongs to another run: {'; '.join(differences(there, header))}. "
                f"{_INSTEAD}"
            )

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            text = decode(line, where="it")
            value: dict[str, Any] = parse_json(text, where="it")
        except DiffencError as error:
            shown = f"{line[:60]!r}: {error}"
            raise self._foreign() if number == 1 else self._broken(number, shown) from error
        return value

    def _take(self, number: int, line: Mapping[str, Any]) -> None:
        kind = self.kind
        try:
            if line["type"] == "model":
                name = checked(line["name"], str, "name")
                copy = name in self._models
                self._models[name] = checked(line["description"], dict[str, Any], "description")
            else:
                check_choice("type", line["type"], [kind.line])
                types = zip(kind.keys, (str, kind.part_type, str), strict=True)
                key: Any = tuple(checked(line[name], type_, name) for name, type_ in types)
                copy = key in self._values and line.get(_AGAIN) is not True
                value = checked(line[kind.value], kind.value_type, kind.value)
                kind.check(value)
                self._values[key] = (checked(line["digest"], str, "digest"), value)
        except KeyError as error:
            raise self._broken(number, f"it lacks {error}") from error
        except DiffencError as error:
            raise self._broken(number, str(error)) from error
        if copy:
            raise self._broken(number, "a line before it stands for the same")

    def _foreign(self) -> ConfigError:
        return ConfigError(
            f"{self.path} is no file of {self.kind.plural} of diffenc: take another name"
        )

    def _broken(self, number: int, why: str) -> ConfigError:
        return ConfigError(
            f"line {number} of {self.path} is broken: {why}. Delete that line to "
            f"make its {self.kind.value} again, or begin anew with --force"
        )

    def _write(self, line: Mapping[str, Any]) -> None:
        with reporting(self.path):
            text = json.dumps(line, ensure_ascii=False, allow_nan=False)
            self._file.write(text.encode("utf-8", "replace") + b"\n")
            self._file.flush()


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """List the differences of two JSON values: ``"config.timesteps is [189], was [189, 389]"``."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for key in dict.fromkeys([*one, *other])
            for line in differences(
                one.get(key, _NONE), other.get(key, _NONE), f"{path}.{key}".lstrip(".")
            )
        ]
    return [f"{path} is {_shown(other)}, was {_shown(one)}"] if one != other else []


def _shown(value: Any) -> str:
    return "null" if value is _NONE else json.dumps(value)
