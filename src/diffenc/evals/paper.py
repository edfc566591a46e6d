"""The paper's tables as data, with their errata noted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from diffenc.errors import ConfigError
from diffenc.evals.results import percent
from diffenc.evals.tables import Table
from diffenc.storage.reading import read_json

_FILE = "paper_tables.json"
_ABSENT = "–"


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A row as published.

    Attributes:
        labels: Model and settings of the row, one per label of the table; "" if the paper has none.
        values: Numbers of the row in the order of the columns; None if the paper has none.
        deviations: Sample standard deviations over three trials; None if the paper gives none.
        printed: Values as they stand in the paper, if they had to be corrected; None if not.
        doubtful: Columns whose value cannot be right, see the table's notes.
        parameters: Number of parameters, in millions; None if the paper gives none.
    """

    labels: tuple[str, ...]
    values: tuple[float | None, ...]
    deviations: tuple[float, ...] | None = None
    printed: tuple[float, ...] | None = None
    doubtful: tuple[str, ...] = ()
    parameters: float | None = None

    @property
    def percents(self) -> list[str]:
        """Values with their deviations, rounded as results are: ``"31.9 ± 2.7"``."""
        deviations: Sequence[float | None] = self.deviations or [None] * len(self.values)
        return [
            _ABSENT if value is None else percent(value, deviation)
            for value, deviation in zip(self.values, deviations, strict=True)
        ]

    @property
    def label(self) -> str:
        """Model and settings in one text."""
        return ", ".join(filter(None, self.labels))


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A table as published.

    Attributes:
        title: Number and subject of the table.
        labels: Headings of the columns that hold labels.
        columns: Headings of the columns that hold values.
        rows: Rows in the paper's order.
        notes: Errata, and facts that the paper does not state.
    """

    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[PublishedRow, ...]
    notes: tuple[str, ...]

    def to_table(self) -> Table:
        """Convert all cells to text; "–" where there is no value."""
        rows = tuple((*row.labels, *map(cell, row.values)) for row in self.rows)
        return Table(self.title, (*self.labels, *self.columns), rows)

    def beside(self, columns: Sequence[str]) -> list[tuple[str, ...]]:
        """Rows for a table whose first column names the model and whose others are these."""
        made = []
        for row in self.rows:
            values = dict(zip(self.columns, row.values, strict=True))
            cells = (cell(values.get(column)) for column in columns)
            made.append((f"paper: {row.label}", *cells))
        return made


def cell(value: float | None) -> str:
    """A number as the paper prints it, or "–" for None."""
    return _ABSENT if value is None else f"{value:g}"


def published_tables() -> tuple[str, ...]:
    """Names of the tables."""
    return tuple(_content()["tables"])


def published_source() -> str:
    """Source of the tables."""
    return str(_content()["source"])


def published_table(name: str) -> PublishedTable:
    """A table by name: one of `published_tables()`.

    Raises:
        ConfigError: There is none of that name.

    Examples:
        >>> published_table("later-fusion").beside(("MMVP",))[-1]
        ('paper: later version, cross-attention, s = 4', '30.7')
    """
    tables: dict[str, dict[str, Any]] = _content()["tables"]
    if name not in tables:
        raise ConfigError(f"there is no table {name!r}; known are {sorted(tables)}")
    table = tables[name]
    entries: list[dict[str, Any]] = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        for row in table["rows"]
    ]
    rows = tuple(PublishedRow(**entry) for entry in entries)
    labels, columns, notes = (tuple(table[key]) for key in ("labels", "columns", "notes"))
    return PublishedTable(table["title"], labels, columns, rows, notes)


def paper_page() -> str:
    """All tables as Markdown: the page `docs/results/paper-tables.md`."""
    lines = [
        "# The paper's tables\n",
        f"Transcribed from {published_source()}.\n",
        "`diffenc evaluate` sets them beside what it measures on real data. As data they are in "
        "`diffenc/evals/paper_tables.json`; `diffenc.evals.paper.published_table` reads them.\n",
        "None of these rows was measured by diffenc.\n",
    ]
    for name in published_tables():
        table = published_table(name)
        lines += [f"## {table.title}\n", f"| {' | '.join((*table.labels, *table.columns))} |"]
        lines.append(f"|{' --- |' * len(table.labels)}{' ---: |' * len(table.columns)}")
        lines += [f"| {' | '.join((*row.labels, *_printed(row)))} |" for row in table.rows]
        lines += ["", *(f"{note}\n" for note in table.notes)]
    return "\n".join(lines)


def _printed(row: PublishedRow) -> list[str]:
    texts = [_ABSENT if value is None else str(value) for value in row.values]
    if row.deviations is None:
        return texts
    return [f"{text} ± {error}" for text, error in zip(texts, row.deviations, strict=True)]


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = read_json(str(files("diffenc.evals") / _FILE))
    return content
