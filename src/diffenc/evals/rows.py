"""Rows of a dataset's table, read under any of the names that its columns have."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any, Literal

from diffenc._optional import require
from diffenc.errors import ConfigError, near_matches
from diffenc.evals.items import Problem
from diffenc.storage.lines import parse_csv, parse_json_lines
from diffenc.storage.names import printable, reason
from diffenc.storage.reading import decode

_KINDS: Mapping[str, tuple[type, ...]] = {"plain": (str, Real), "text": (str,), "any": (object,)}
_ROWS = 1_000_000
_TABLE_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Column:
    """A column that a loader reads.

    Attributes:
        name: Name of the column in the benchmark's own files.
        also: Other names of the column; spaces, underscores and case are ignored in all names.
        needed: Whether the benchmark cannot be read without this column.
        kind: Type of the cells: a text or a number ("plain"), or a text ("text"); cells of "any"
            are checked by the code that reads them.
    """

    name: str
    also: tuple[str, ...] = ()
    needed: bool = True
    kind: Literal["plain", "text", "any"] = "plain"


@dataclass(frozen=True, slots=True)
class Row:
    """A row under the names that the loader knows.

    Attributes:
        where: Place of the row for error messages, such as "metadata.csv, line 3".
        values: Value of each column; columns that this copy lacks are left out.
    """

    where: str
    values: Mapping[str, Any]

    def text(self, column: str) -> str:
        """The value without spaces around it; "" where there is none, or NaN stands for none."""
        value = self.values.get(column)
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        return "" if missing else str(value).strip()


@dataclass(frozen=True, slots=True)
class TableRows:
    """Rows of a table.

    Attributes:
        rows: Rows that can be read.
        problems: Faults of the rows that cannot be read.
        notes: Remarks on the columns of the table.
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
    """Find the columns of a table by name, and make notes on renamed and unused ones.

    Raises:
        ConfigError: One that is needed is missing; the message lists what is there.
    """
    names = [plain_name(str(name)) for name in header]
    by_name = dict(zip(reversed(names), reversed(header), strict=True))
    picked: dict[str, str] = {}
    for column in columns:
        for name in (column.name, *column.also):
            if plain_name(name) in by_name and by_name[plain_name(name)] not in picked.values():
                picked[column.name] = by_name[plain_name(name)]
                break
    if lacking := [c.name for c in columns if c.needed and c.name not in picked]:
        free = [name for name in header if name not in picked.values()]
        raise ConfigError(
            f"{where} has no column {', '.join(map(repr, lacking))}; its columns are "
            f"{list(header)}.{near_matches(lacking[0], free)} Give them the names of the original."
        )
    for actual in picked.values():
        if names.count(plain_name(actual)) > 1:
            raise ConfigError(f"{where} has the column {actual!r} twice; leave one of them")
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
    (_, header), *lines = parse_csv(decode(content, where=where), where=where) or [(1, [])]
    picked, notes = match_columns(header, columns, where)
    whole, problems = [], []
    for number, cells in lines:
        place = f"{where}, line {number}"
        if len(cells) != len(header):
            detail = f"{len(cells)} values for {len(header)} columns"
            problems.append(Problem("broken rows", place, detail))
        else:
            whole.append((place, dict(zip(header, cells, strict=True))))
    return _table(whole, picked, columns, notes, problems)


def read_jsonl(content: bytes, columns: Sequence[Column], where: str) -> TableRows:
    """Rows of a file with one JSON object per line; rows may lack what others have.

    Raises:
        ConfigError: It is no such file, or no row has a column that is needed.
    """
    objects, broken = parse_json_lines(decode(content, where=where), where=where)
    problems = [Problem("broken rows", f"{where}, line {n}", detail) for n, detail in broken]
    rows = [(f"{where}, line {number}", value) for number, value in objects]
    return _table(rows, *_columns_of(rows, columns, where), problems=problems)


def rows_of(
    source: Iterable[Mapping[str, Any]], columns: Sequence[Column], where: str
) -> TableRows:
    """Rows that are in memory already, such as those of the `datasets` library.

    Raises:
        ConfigError: They are no list of tables, or a column is missing.
    """
    if isinstance(source, Mapping):
        raise ConfigError(
            f"{where} must be a list of tables, got {type(source).__name__} with the keys "
            f"{printable([*source], 80)}; pass the rows of one of them"
        )
    if not isinstance(source, Iterable):
        raise ConfigError(f"{where} must be a list of tables, got {type(source).__name__}")
    rows = [(f"{where}, row {number}", value) for number, value in enumerate(source)]
    return _table(rows, *_columns_of(rows, columns, where), problems=[])


def read_parquet(
    paths: Sequence[Any], columns: Sequence[Column], pictures: Sequence[str], where: str
) -> TableRows:
    """Rows of parquet files; pictures become functions that read their bytes when called.

    Args:
        paths: Paths of the files, in order.
        columns: Columns to read.
        pictures: Names of the columns that hold pictures, as `{"bytes": ..., "path": ...}`; None
            where a cell is empty.
        where: Name of the table in error messages.

    Raises:
        ConfigError: A file is broken or too large, or a column is missing.
        MissingExtraError: pyarrow is not installed.
    """
    parquet = require("pyarrow.parquet", extra="evals")
    rows: list[Row] = []
    problems: list[Problem] = []
    notes: tuple[str, ...] = ()
    first = 0
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                picked, notes = match_columns(list(file.schema_arrow.names), columns, where)
                entries = _parquet_rows(file, str(path), picked, pictures)
        except ConfigError:
            raise
        except Exception as error:  # pyarrow has errors of its own
            raise ConfigError(f"cannot read {path}: {reason(error)}; download it again") from error
        own = dict(zip(picked, picked, strict=True))
        placed = [(f"{where}, row {first + n}", row) for n, row in enumerate(entries)]
        first += len(entries)
        table = _table(placed, own, columns, notes, [])
        rows += table.rows
        problems += table.problems
    return TableRows(tuple(rows), tuple(problems), notes)


def _parquet_rows(
    file: Any, path: str, picked: Mapping[str, str], pictures: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows under the loader's names; a file of a few bytes may stand for any number of them."""
    plain = {name: actual for name, actual in picked.items() if name not in pictures}
    if file.metadata.num_rows > _ROWS:
        raise ConfigError(f"{path} has {file.metadata.num_rows:,} rows; {_ROWS:,} are too many")
    rows: list[dict[str, Any]] = []
    size = 0
    for group in range(file.num_row_groups):
        first = len(rows)
        options = {"row_groups": [group], "columns": list(plain.values())}
        for batch in file.iter_batches(batch_size=256, **options):
            size += batch.nbytes
            if size > _TABLE_BYTES:
                raise ConfigError(f"the table in {path} is larger than {_TABLE_BYTES:,} bytes")
            rows += [{n: row[a] for n, a in plain.items()} for row in batch.to_pylist()]
        for name in (name for name in pictures if name in picked):
            column = file.read_row_group(group, columns=[picked[name]])[picked[name]]
            for index, there in enumerate(column.is_valid().to_pylist()):
                reader = _cell_reader(path, group, picked[name], index) if there else None
                rows[first + index][name] = reader
    return rows


def _cell_reader(path: str, group: int, column: str, index: int) -> Callable[[], bytes]:
    def read() -> bytes:
        value = _group(path, group, column)[index].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ConfigError("the cell holds no bytes of a picture")
        return content

    return read


@lru_cache(maxsize=4)  # the picture columns of the group that is being read
def _group(path: str, group: int, column: str) -> Any:
    parquet = require("pyarrow.parquet", extra="evals")
    try:
        with parquet.ParquetFile(path) as file:
            return file.read_row_group(group, columns=[column])[column]
    except Exception as error:  # pyarrow has errors of its own
        raise ConfigError(f"cannot read {path}: {reason(error)}") from error


def whole_number(text: str) -> int | None:
    """A number as tables have it: ``"12"``, ``"012"`` or ``"12.0"``; None for anything else."""
    match = re.fullmatch(r"([0-9]{1,9})(\.0+)?", text)
    return int(match[1]) if match else None


def _columns_of(
    rows: Sequence[tuple[str, Mapping[str, Any]]], columns: Sequence[Column], where: str
) -> tuple[dict[str, str], Sequence[Column], tuple[str, ...]]:
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise ConfigError(f"{place} must be a table, got {type(row).__name__}")
    header = list(dict.fromkeys(key for _, row in rows for key in row if isinstance(key, str)))
    picked, notes = match_columns(header, columns, where)
    return picked, columns, notes


def _table(
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    picked: Mapping[str, str],
    columns: Sequence[Column],
    notes: tuple[str, ...],
    problems: list[Problem],
) -> TableRows:
    """Rows under the loader's names; those whose cells have another type are problems."""
    kinds = {column.name: _KINDS[column.kind] for column in columns}
    rows_read = []
    for place, row in rows:
        cells = {name: row[actual] for name, actual in picked.items() if actual in row}
        wrong = [name for name in cells if not _fits(cells[name], *kinds[name])]
        if wrong:
            kind = type(cells[wrong[0]]).__name__
            what = "no text" if len(kinds[wrong[0]]) == 1 else "no text and no number"
            detail = f"{wrong[0]} is {what}, but {kind}"
            problems.append(Problem("broken rows", place, detail))
        else:
            rows_read.append(Row(place, cells))
    return TableRows(tuple(rows_read), tuple(problems), notes)


def _fits(value: Any, *kinds: type) -> bool:
    if value is None or object in kinds or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, kinds) and not isinstance(value, bool)
