"""The paper's tables on captions, leakage and questions, as data, with their errata noted."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from diffenc.errors import ConfigError
from diffenc.evals.report import Table

_FILE = "paper_tables.json"


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A row as published.

    Attributes:
        labels: Model and settings, one per label of the table; "" where the paper has none.
        values: In the order of the columns; None where the paper has none.
        doubtful: Columns whose value cannot be right, see the table's notes.
    """

    labels: tuple[str, ...]
    values: tuple[float | None, ...]
    doubtful: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A table as published.

    Attributes:
        title: Number and subject.
        labels: Heads of the labels.
        columns: Heads of the values.
        rows: In the paper's order.
        notes: Errata, and what is not stated.
    """

    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[PublishedRow, ...]
    notes: tuple[str, ...]

    def to_table(self) -> Table:
        """As text; "–" where there is no value."""
        rows = tuple((*row.labels, *map(cell, row.values)) for row in self.rows)
        return Table(self.title, (*self.labels, *self.columns), rows)

    def beside(self, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Rows for a table whose first column names the model and whose others are these."""
        made = []
        for row in self.rows:
            values = dict(zip(self.columns, row.values, strict=True))
            cells = [cell(values.get(column)) for column in columns]
            made.append((f"paper: {', '.join(filter(None, row.labels))}", *cells))
        return made


def cell(value: float | None) -> str:
    """As the paper prints it, or "–"."""
    return "–" if value is None else f"{value:g}"


def published_tables() -> tuple[str, ...]:
    """Names of the tables."""
    return tuple(_content()["tables"])


def published_source() -> str:
    """Where the tables come from."""
    return str(_content()["source"])


def published_table(name: str) -> PublishedTable:
    """A table by name: "captions", "guidance", "leakage", "vqa" or "blink".

    Raises:
        ConfigError: There is none of that name.
    """
    tables = _content()["tables"]
    if name not in tables:
        raise ConfigError(f"there is no table {name!r}; known are {sorted(tables)}")
    table = tables[name]
    rows = tuple(
        PublishedRow(tuple(row["labels"]), tuple(row["values"]), tuple(row.get("doubtful", ())))
        for row in table["rows"]
    )
    labels, columns, notes = (tuple(table[key]) for key in ("labels", "columns", "notes"))
    return PublishedTable(table["title"], labels, columns, rows, notes)


@cache
def _content() -> dict[str, Any]:
    text = (files("diffenc.evals.answering") / _FILE).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content
