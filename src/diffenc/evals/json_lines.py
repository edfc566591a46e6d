"""JSON lines that are appended one by one, so that an interrupted run goes on where it stopped."""

import json
import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

from diffenc._version import __version__
from diffenc.config import check_choice
from diffenc.errors import ConfigError, DiffencError, OutputError
from diffenc.storage.names import is_file
from diffenc.storage.reading import DATA_BYTES, decode, parse_json, read_bytes
from diffenc.storage.schema import checked
from diffenc.storage.writing import locked, reporting

# `Self` is not known to the check of annotations at run time (make test-shapes).
_File = TypeVar("_File", bound="JsonLinesFile")

_NONE = object()

_AGAIN = "again"
"""Key of a line that replaces an earlier one; any other second line is a copy."""

Key = tuple[str, int | str, str]
"""Name of the model, trial or part of the protocol, id of the item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """Names that a kind of file gives its lines, and the words of its error messages.

    Attributes:
        header: Type of the first line.
        line: Type of the lines that hold values.
        keys: Names under which a line holds the three parts of its key.
        value: Name under which a line holds its value.
        foreign: Predicate that describes a file of another kind: "it ...".
        other_run: Predicate that describes a file with another header: "it ...".
        values: Noun for the values of a model, in the plural.
        made_from: Noun phrase for the data that values are made from.
        again: Command that deals with the item of a deleted line.
        instead: Advice for a file of another run.
        instead_of_name: Advice for another model by the same name.
    """

    header: str
    line: str
    keys: tuple[str, str, str]
    value: str
    foreign: str
    other_run: str
    values: str
    made_from: str
    again: str
    instead: str
    instead_of_name: str


class JsonLinesFile:
    """A header, one line each model, and a line each value as it comes.

    Lines are appended whole; a last line that was torn by a crash is removed when the file is
    opened. What a value was made from is kept as a digest, so that it is never taken for another.
    While one program has the file open, no other one opens it.

    Args:
        path: Path of the file, which is created if it does not exist.
        header: Facts that must equal those of an existing file for its values to be reused.
        source: Origin of the items; written into the file, not compared.

    Raises:
        ConfigError: The file belongs to something else, or a line is broken or a copy.
        OutputError: It cannot be read or written, or another program has it open.
    """

    wording: ClassVar[Wording]
    parts: ClassVar[type]
    """Type of the middle part of keys."""

    def __init__(self, path: Path, header: Mapping[str, Any], *, source: str) -> None:
        self.path = path
        self._models: dict[str, Any] = {}
        self._values: dict[Key, tuple[str, Any]] = {}
        header = {"type": self.wording.header, "format": 1, **header}
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
        found = self._values.get(key)
        if found is None:
            return None
        if found[0] != digest:
            raise ConfigError(
                f"{self.path} was made from other data: {self.wording.made_from} of item "
                f"{key[2]!r} differ. {self.wording.instead}"
            )
        return found[1]

    def add(self, key: Key, digest: str, value: Any, **more: Any) -> None:
        """Append a value, which takes the place of one by that key; `more` is for readers.

        Raises:
            OutputError: It cannot be written.
        """
        again = {_AGAIN: True} if key in self._values else {}
        self._values[key] = (digest, value)
        line = {"type": self.wording.line, **dict(zip(self.wording.keys, key, strict=True))}
        self._write({**line, **again, "digest": digest, **more, self.wording.value: value})

    def others(self, model: str, items: Collection[str]) -> list[str]:
        """Items for which the file holds values of a model, other than these."""
        there = (item for name, _, item in self._values if name == model and item not in items)
        return list(dict.fromkeys(there))

    def check_value(self, value: Any) -> Any:
        """A value of a line, or a `ConfigError` where it is none of this kind of file."""
        raise NotImplementedError

    def _add_model(self, name: str, description: Mapping[str, Any]) -> None:
        """Note what a model's values depend on.

        Raises:
            ConfigError: The file holds values of another model or configuration by that name.
        """
        plain = parse_json(json.dumps(dict(description)), where=f"the description of {name}")
        known = self._models.get(name)
        if known is None:
            self._models[name] = plain
            self._write({"type": "model", "name": name, "description": plain})
        elif known != plain:
            raise ConfigError(
                f"{self.path} holds {self.wording.values} of {name!r} in another configuration: "
                f"{'; '.join(differences(known, plain))}. {self.wording.instead_of_name}"
            )

    def _read(self, header: Mapping[str, Any]) -> None:
        there = is_file(self.path)
        content = read_bytes(self.path, error=OutputError, most=DATA_BYTES) if there else b""
        whole, _, torn = content.rpartition(b"\n")
        start = f'{{"type": "{self.wording.header}"'.encode()
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
                f"{self.path} {self.wording.other_run}: {'; '.join(differences(there, header))}. "
                f"{self.wording.instead}"
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
        wording = self.wording
        try:
            if line["type"] == "model":
                name = checked(line["name"], str, "name")
                copy = name in self._models
                self._models[name] = checked(line["description"], dict[str, Any], "description")
            else:
                check_choice("type", line["type"], [wording.line])
                kinds = zip(wording.keys, (str, self.parts, str), strict=True)
                key: Any = tuple(checked(line[name], kind, name) for name, kind in kinds)
                copy = key in self._values and line.get(_AGAIN) is not True
                value = self.check_value(line[wording.value])
                self._values[key] = (checked(line["digest"], str, "digest"), value)
        except KeyError as error:
            raise self._broken(number, f"it lacks {error}") from error
        except DiffencError as error:
            raise self._broken(number, str(error)) from error
        if copy:
            raise self._broken(number, "a line before it stands for the same")

    def _foreign(self) -> ConfigError:
        return ConfigError(f"{self.path} {self.wording.foreign}: take another name")

    def _broken(self, number: int, why: str) -> ConfigError:
        return ConfigError(
            f"line {number} of {self.path} is broken: {why}. Delete that line to "
            f"{self.wording.again}"
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
