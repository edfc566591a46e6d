"""Rows of a dataset's table, whatever its columns are called in this copy of it."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from diffenc._optional import require
from diffenc.errors import ConfigError, near_matches
from diffenc.evals.base import Problem


@dataclass(frozen=True, slots=True)
class Column:
    """A column that a loader reads.

    Attributes:
        name: In the benchmark's own files.
        also: Other names seen; spaces, underscores and case never count.
        needed: Whether there is no benchmark without it.
    """

    name: str
    also: tuple[str, ...] = ()
    needed: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """A row under the names that the loader knows.

    Attributes:
        where: For messages: "metadata.csv, line 3".
        values: Per column; columns that this copy lacks are left out.
    """

    where: str
    values: Mapping[str, Any]

    def text(self, column: str) -> str:
        """The value without spaces around it; "" where there is none."""
        value = self.values.get(column)
        return "" if value is None else str(value).strip()


@dataclass(frozen=True, slots=True)
class TableRows:
    """What a table holds.

    Attributes:
        rows: Those that can be read.
        problems: Those that cannot.
        notes: On its columns.
    """

    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def plain_name(name: str) -> str:
    """Letters and digits alone, in lower case, as names are compared."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def match_columns(
    header: Sequence[str], columns: Sequence[Column], where: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Which column of a table is which, and what is to be said about the others.

    Raises:
        ConfigError: One that is needed is missing; the message lists what is there.
    """
    found = {plain_name(name): name for name in reversed(header)}
    picked: dict[str, str] = {}
    for column in columns:
        for name in (column.name, *column.also):
            if plain_name(name) in found and found[plain_name(name)] not in picked.values():
                picked[column.name] = found[plain_name(name)]
                break
    if lacking := [c.name for c in columns if c.needed and c.name not in picked]:
        free = [name for name in header if name not in picked.values()]
        raise ConfigError(
            f"{where} has no column {', '.join(map(repr, lacking))}; its columns are "
            f"{list(header)}.{near_matches(lacking[0], free)} Give them the names of the original."
        )
    notes = [
        f"{where}: column {actual!r} is read as {name!r}"
        for name, actual in picked.items()
        if actual != name
    ]
    if extra := [name for name in header if name not in picked.values()]:
        notes.append(f"{where}: columns {extra} are not used")
    return picked, tuple(notes)


def read_csv(content: bytes, columns: Sequence[Column], where: str) -> TableRows:
    """Rows of a CSV file with a header; quoted commas and line breaks are part of a value.

    Raises:
        ConfigError: It is no such file, or a column is missing.
    """
    lines = csv.reader(io.StringIO(_text(content, where), newline=""), strict=True)
    rows, problems = [], []
    try:
        header = next(lines, [])
        picked, notes = match_columns(header, columns, where)
        for cells in lines:
            place = f"{where}, line {lines.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                detail = f"{len(cells)} values for {len(header)} columns"
                problems.append(Problem("broken rows", place, detail))
                continue
            whole = dict(zip(header, cells, strict=True))
            rows.append(Row(place, {name: whole[actual] for name, actual in picked.items()}))
    except csv.Error as error:
        raise ConfigError(f"{where}, line {lines.line_num} is no CSV: {error}") from error
    return TableRows(tuple(rows), tuple(problems), notes)


def read_jsonl(content: bytes, columns: Sequence[Column], where: str) -> TableRows:
    """Rows of a file with one JSON object per line; rows may lack what others have.

    Raises:
        ConfigError: It is no such file, or no row has a column that is needed.
    """
    objects, problems = [], []
    for number, line in enumerate(_text(content, where).splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            problems.append(Problem("broken rows", place, str(error)))
            continue
        if isinstance(value, dict):
            objects.append((place, value))
        else:
            problems.append(Problem("broken rows", place, "it is no JSON object"))
    header = list(dict.fromkeys(key for _, value in objects for key in value))
    picked, notes = match_columns(header, columns, where)
    rows = [
        Row(place, {name: value[actual] for name, actual in picked.items() if actual in value})
        for place, value in objects
    ]
    return TableRows(tuple(rows), tuple(problems), notes)


def rows_of(found: Sequence[Mapping[str, Any]], columns: Sequence[Column], where: str) -> TableRows:
    """Rows that are in memory already, such as those of the `datasets` library."""
    header = list(dict.fromkeys(key for value in found for key in value))
    picked, notes = match_columns(header, columns, where)
    rows = tuple(
        Row(
            f"{where}, row {number}",
            {name: value[actual] for name, actual in picked.items() if actual in value},
        )
        for number, value in enumerate(found)
    )
    return TableRows(rows, (), notes)


def read_parquet(
    paths: Sequence[Any], columns: Sequence[Column], pictures: Sequence[str], where: str
) -> TableRows:
    """Rows of parquet files; pictures become functions that read their bytes when called.

    Args:
        paths: The files, in order.
        columns: To read.
        pictures: Those of them that hold pictures, as `{"bytes": ..., "path": ...}`.
        where: For messages.

    Raises:
        ConfigError: A file is broken, or a column is missing.
        MissingExtraError: pyarrow is not installed.
    """
    parquet = require("pyarrow.parquet", extra="evals")
    rows: list[Row] = []
    notes: tuple[str, ...] = ()
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                picked, notes = match_columns(list(file.schema_arrow.names), columns, where)
                plain = {n: a for n, a in picked.items() if n not in pictures}
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=list(plain.values())).to_pylist()
                    for index, values in enumerate(table):
                        cells: dict[str, Any] = {n: values[a] for n, a in plain.items()}
                        for name in pictures:
                            cells[name] = _cell_reader(str(path), group, picked[name], index)
                        rows.append(Row(f"{where}, row {len(rows)}", cells))
        except ConfigError:
            raise
        except Exception as error:  # pyarrow has errors of its own
            raise ConfigError(f"cannot read {path}: {error}; download it again") from error
    return TableRows(tuple(rows), (), notes)


def _cell_reader(path: str, group: int, column: str, index: int) -> Callable[[], bytes]:
    def read() -> bytes:
        value = _group(path, group, column)[index].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError("the cell holds no bytes of a picture")
        return content

    return read


@lru_cache(maxsize=2)  # the two picture columns of the group that is being read
def _group(path: str, group: int, column: str) -> Any:
    parquet = require("pyarrow.parquet", extra="evals")
    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column])[column]


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not in UTF-8: {error}") from error
