"""JSON lines that are appended one by one, so that an interrupted run goes on where it stopped."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

from diffenc._version import __version__
from diffenc.errors import ConfigError, OutputError

# `Self` is not known to the check of annotations at run time (make test-shapes).
_File = TypeVar("_File", bound="JsonLinesFile")

Key = tuple[str, int | str, str]
"""Name of the model, trial or part of the protocol, id of the item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """What a kind of file calls its lines, and what it says of another one.

    Attributes:
        header: Type of the first line.
        line: Type of the lines that hold values.
        keys: Under which names a line holds the three parts of its key.
        value: Under which name it holds what it is for.
        foreign: Of a file of another kind: "it ...".
        other_run: Of a file with another header: "it ...".
        values: Of a model, in the plural.
        made_from: What values are made from.
        again: What happens to the item of a line that is deleted.
        instead: What to do about a file of another run.
        instead_of_name: What to do about another model by the same name.
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

    Args:
        path: Of the file, which is made where it does not exist.
        header: What must be equal for values to be taken from the file.
        source: Where items come from; told, not compared.

    Raises:
        ConfigError: The file belongs to something else, or a line is broken.
        OutputError: It cannot be read or written.
    """

    wording: ClassVar[Wording]

    def __init__(self, path: Path, header: Mapping[str, Any], *, source: str) -> None:
        self.path = path
        self._models: dict[str, Any] = {}
        self._values: dict[Key, tuple[str, Any]] = {}
        header = {"type": self.wording.header, "format": 1, **header}
        try:
            self._read(header)
            self._file: IO[bytes] = path.open("ab")
        except OSError as error:
            raise OutputError(f"cannot use {path}: {error.strerror or error}") from error
        if self._file.tell() == 0:
            self._write({**header, "version": __version__, "source": source})

    def __enter__(self: _File) -> _File:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Bring everything to the disk."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

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
        """Append a value; `more` is for readers of the file.

        Raises:
            OutputError: It cannot be written.
        """
        self._values[key] = (digest, value)
        line = {"type": self.wording.line, **dict(zip(self.wording.keys, key, strict=True))}
        self._write({**line, "digest": digest, **more, self.wording.value: value})

    def _add_model(self, name: str, description: Mapping[str, Any]) -> None:
        """Note what a model's values depend on.

        Raises:
            ConfigError: The file holds values of another model or configuration by that name.
        """
        plain = json.loads(json.dumps(dict(description)))
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
        content = self.path.read_bytes() if self.path.exists() else b""
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
            with self.path.open("r+b") as file:
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
            value = json.loads(line)
            if isinstance(value, dict):
                return value
        except ValueError:
            pass
        raise self._foreign() if number == 1 else self._broken(number, repr(line[:60]))

    def _take(self, number: int, line: Mapping[str, Any]) -> None:
        try:
            if line["type"] == "model":
                self._models[line["name"]] = line["description"]
            else:
                model, part, item = (line[name] for name in self.wording.keys)
                self._values[model, part, item] = (line["digest"], line[self.wording.value])
        except (KeyError, TypeError) as error:
            raise self._broken(number, f"it lacks {error}") from error

    def _foreign(self) -> ConfigError:
        return ConfigError(f"{self.path} {self.wording.foreign}: take another name")

    def _broken(self, number: int, why: str) -> ConfigError:
        return ConfigError(
            f"line {number} of {self.path} is broken: {why}. Delete that line to "
            f"{self.wording.again}"
        )

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
