"""Files read with checks on size, depth and type.

Every reader raises the error that its caller names, whatever is wrong with the file.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from diffenc.errors import ConfigError, DiffencError
from diffenc.storage.folder_kinds import kind_of_folder
from diffenc.storage.names import SURROGATE, StrPath, printable, reason

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG_BYTES = 64 * 2**20
"""Largest file that is read as a config, in bytes."""

DATA_BYTES = 8 * 2**30
"""Largest file that is read as data, in bytes."""

_DEPTH = 100
_INTEGER = 2**64
_contents: ContextVar[dict[str, bytes] | None] = ContextVar("files of this block", default=None)


@contextmanager
def reading_once() -> Iterator[None]:
    """Read each file of the block once: whatever asks again gets the same content.

    A model's configs are asked by several checks, one after the other. Blocks may lie in each
    other; the outermost one counts, and forgets at its end.
    """
    if _contents.get() is not None:
        yield
        return
    token = _contents.set({})
    try:
        yield
    finally:
        _contents.reset(token)


def read_bytes(
    path: StrPath, *, error: type[DiffencError] = ConfigError, most: int = CONFIG_BYTES
) -> bytes:
    """The content of a file.

    Args:
        path: File to read; a pipe without a writer counts as empty.
        error: Class of the exception that is raised.
        most: Largest size, in bytes.

    Raises:
        DiffencError: `error`: the file is missing, unreadable or too large.
    """
    known = _contents.get()
    key = os.fspath(path)
    if known is not None and key in known and len(known[key]) <= most:
        return known[key]
    content = _read(path, error, most)
    if known is not None and len(content) <= CONFIG_BYTES:
        known[key] = content
    return content


def _read(path: StrPath, error: type[DiffencError], most: int) -> bytes:
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        # Opened without waiting: a pipe that nobody writes to would stop the program for good.
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            if hasattr(os, "set_blocking"):
                os.set_blocking(file.fileno(), True)
            content = file.read(most + 1)
    except (OSError, ValueError, MemoryError) as failure:
        missing = isinstance(failure, FileNotFoundError)
        kind = kind_of_folder(Path(path).parent) if missing else ""
        hint = f"; the folder holds {kind}" if kind else ""
        raise error(f"cannot read {printable(path)}: {reason(failure)}{hint}") from failure
    if len(content) > most:
        raise error(f"cannot read {path}: it is larger than {most:,} bytes")
    return content


def read_text(
    path: StrPath, *, error: type[DiffencError] = ConfigError, most: int = CONFIG_BYTES
) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; see `read_bytes`."""
    return decode(read_bytes(path, error=error, most=most), where=str(path), error=error)


def decode(content: bytes, *, where: str, error: type[DiffencError] = ConfigError) -> str:
    """Bytes as text in UTF-8, with or without a byte order mark.

    Raises:
        DiffencError: `error`: they are in another encoding, or hold null bytes.
    """
    # UTF-16 without its mark is valid UTF-8, with a null byte in each letter.
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise error(f"{where} is not in UTF-8 but in UTF-16, or is no text: save it in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{where} is not in UTF-8: {failure}; save it in UTF-8") from failure


def text_lines(text: str) -> list[str]:
    """Lines of a text, which end in a line feed, or a carriage return and one.

    `str.splitlines` takes eight other characters for ends of lines, U+2028 among them, which JSON
    allows within a string.
    """
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def read_json(
    path: StrPath,
    kind: type = dict,
    *,
    error: type[DiffencError] = ConfigError,
    most: int = CONFIG_BYTES,
    finite: bool = True,
) -> Any:
    """The value in a JSON file.

    Args:
        path: File to read.
        kind: Type that the file must hold: `dict`, `list`, or `object` for anything.
        error: Class of the exception that is raised.
        most: Largest size, in bytes.
        finite: Whether NaN and infinity raise an error; the schedulers of diffusers write them.

    Raises:
        DiffencError: `error`: the file is missing, unreadable or too large, or see `parse_json`.
    """
    text = read_text(path, error=error, most=most)
    return parse_json(text, kind, where=str(path), error=error, finite=finite)


def parse_json(
    text: str,
    kind: type = dict,
    *,
    where: str,
    error: type[DiffencError] = ConfigError,
    finite: bool = True,
) -> Any:
    """The value of a JSON text.

    Args:
        text: Text in JSON.
        kind: Type that the value must have: `dict`, `list`, or `object` for anything.
        where: Place of the text, for messages.
        error: Class of the exception that is raised.
        finite: Whether NaN and infinity raise an error.

    Raises:
        DiffencError: `error`: the text is no JSON, is of another kind, is nested too deeply, or
            holds a number or a text that cannot be kept or a key twice.
    """
    checks: dict[str, Any] = {"parse_int": _integer, "object_pairs_hook": _table}
    if finite:
        checks |= {"parse_constant": _not_finite, "parse_float": _finite_float}
    try:
        value = json.loads(text, **checks)
        _check_plain(value)
    except (ValueError, RecursionError, MemoryError) as failure:
        raise error(f"{where} is no JSON that can be read: {_in_words(failure)}") from failure
    if not isinstance(value, kind):
        expected = "an object in braces" if kind is dict else "a list in brackets"
        raise error(f"{where} must hold {expected}, got {_json_name(value)}")
    return value


def read_toml(
    path: StrPath, *, error: type[DiffencError] = ConfigError, most: int = CONFIG_BYTES
) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        DiffencError: `error`: the file is missing, unreadable or too large, or see `parse_toml`.
    """
    return parse_toml(read_text(path, error=error, most=most), where=str(path), error=error)


def parse_toml(text: str, *, where: str, error: type[DiffencError] = ConfigError) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        DiffencError: `error`: the text is no TOML, is nested too deeply, or holds a number or a
            text that cannot be kept.
    """
    try:
        tables = tomllib.loads(text, parse_float=_finite_float)
        _check_plain(tables)
    except (ValueError, RecursionError, MemoryError) as failure:
        raise error(f"{where} is no TOML that can be read: {_in_words(failure)}") from failure
    return tables


def _check_plain(value: Any) -> None:
    """Raise a `ValueError` for depth, numbers and texts that later steps cannot keep."""
    level: list[Any] = [value]
    for _ in range(_DEPTH):
        for leaf in level:
            if isinstance(leaf, str) and not leaf.isascii() and SURROGATE.search(leaf):
                raise ValueError(f"{printable(ascii(leaf), 40)} is no valid Unicode")
            if isinstance(leaf, int):
                _check_integer(leaf)
        tables = [each for each in level if isinstance(each, dict)]
        level = [entry for each in level if isinstance(each, list) for entry in each]
        level += [entry for table in tables for pair in table.items() for entry in pair]
        if not level:
            return
    raise ValueError(f"it is nested more than {_DEPTH} levels deep")


def _check_integer(value: int) -> int:
    if not -_INTEGER < value < _INTEGER:
        raise ValueError("it holds a whole number of more than 64 bits")
    return value


def _integer(text: str) -> int:
    if len(text) > 21:  # before `int`, which takes time that grows with the square of the digits
        raise ValueError("it holds a whole number of more than 64 bits")
    return _check_integer(int(text))


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{printable(text, 40)} is no finite number")
    return value


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object names {printable(repr(double), 60)} twice")
    return table


def _not_finite(name: str) -> float:
    raise ValueError(f"{name} is no finite number")


def _in_words(failure: BaseException) -> str:
    if isinstance(failure, RecursionError):
        return f"it is nested more than {_DEPTH} levels deep"
    return reason(failure)


def _json_name(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
    }
    return names.get(type(value), "a number")
