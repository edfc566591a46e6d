"""The paper's tables on captions, leakage and questions, as data, with their errata noted."""

from dataclasses import dataclass

from diffenc.evals.report import Table
from diffenc.evals.tables import find_table, read_tables

_PACKAGE = "diffenc.evals.answering"


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A row as published.

    Attributes:
        labels: Model and settings of the row, one per label of the table; "" if the paper has none.
        values: Numbers of the row in the order of the columns; None if the paper has none.
        doubtful: Columns whose value cannot be right, see the table's notes.
    """

    labels: tuple[str, ...]
    values: tuple[float | None, ...]
    doubtful: tuple[str, ...] = ()


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

    def beside(self, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Rows for a table whose first column names the model and whose others are these."""
        made = []
        for row in self.rows:
            values = dict(zip(self.columns, row.values, strict=True))
            cells = [cell(values.get(column)) for column in columns]
            made.append((f"paper: {', '.join(filter(None, row.labels))}", *cells))
        return made


def cell(value: float | None) -> str:
    """A number as the paper prints it, or "–" for None."""
    return "–" if value is None else f"{value:g}"


def published_tables() -> tuple[str, ...]:
    """Names of the tables."""
    return tuple(read_tables(_PACKAGE)["tables"])


def published_source() -> str:
    """Source of the tables."""
    return str(read_tables(_PACKAGE)["source"])


def published_table(name: str) -> PublishedTable:
    """A table by name: "captions", "guidance", "leakage", "vqa" or "blink".

    Raises:
        ConfigError: There is none of that name.
    """
    table = find_table(_PACKAGE, name)
    rows = tuple(
        PublishedRow(tuple(row["labels"]), tuple(row["values"]), tuple(row.get("doubtful", ())))
        for row in table["rows"]
    )
    labels, columns, notes = (tuple(table[key]) for key in ("labels", "columns", "notes"))
    return PublishedTable(table["title"], labels, columns, rows, notes)
