"""The tables of the paper, as data, with its erratum put right."""

from dataclasses import dataclass

from diffenc.evals.tables import find_table, read_tables

_PACKAGE = "diffenc.evals"


@dataclass(frozen=True, slots=True)
class PaperRow:
    """A row as published.

    Attributes:
        model: Name of the model in the paper, or the timestep.
        size: Side of the images in pixels; None if the row has none.
        values: Results in percent, in the order of the columns.
        deviations: Sample standard deviations over three trials; None if the paper gives none.
        printed: Values as they stand in the paper, if they had to be corrected; None if not.
    """

    model: str
    size: int | None
    values: tuple[float, ...]
    deviations: tuple[float, ...] | None = None
    printed: tuple[float, ...] | None = None

    @property
    def label(self) -> str:
        """Model and size."""
        return self.model if self.size is None else f"{self.model} {self.size}"


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table as published.

    Attributes:
        title: Number and subject of the table.
        columns: Headings of the columns.
        rows: Rows in the paper's order.
        notes: Errata, and facts that the paper does not state.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]
    notes: tuple[str, ...]


def paper_source() -> str:
    """Source of the tables."""
    return str(read_tables(_PACKAGE)["source"])


def paper_table(name: str) -> PaperTable:
    """A table by name: "mmvp-vlm", "timesteps" or "winoground".

    Raises:
        ConfigError: There is none of that name.
    """
    table = find_table(_PACKAGE, name)
    rows = tuple(
        PaperRow(
            row["model"],
            row.get("size"),
            tuple(row["values"]),
            *(tuple(row[key]) if key in row else None for key in ("deviations", "printed")),
        )
        for row in table["rows"]
    )
    return PaperTable(table["title"], tuple(table["columns"]), rows, tuple(table["notes"]))


def paper_page() -> str:
    """All tables as Markdown: the page `docs/results/paper-tables.md`."""
    lines = [
        "# The paper's tables\n",
        f"Transcribed from {paper_source()}.\n",
        "`diffenc evaluate` sets them beside what it measures on real data. As data they are in "
        "`diffenc/evals/paper_tables.json`, and `diffenc.evals.paper.paper_table` reads them.\n",
        "None of these rows was measured by diffenc.\n",
    ]
    for name in ("mmvp-vlm", "timesteps", "winoground"):
        table = paper_table(name)
        lines += [f"## {table.title}\n", f"| model | {' | '.join(table.columns)} |"]
        lines.append(f"| --- |{' ---: |' * len(table.columns)}")
        lines += [f"| {row.label} | {' | '.join(_cells(row))} |" for row in table.rows]
        lines += ["", *(f"{note}\n" for note in table.notes)]
    return "\n".join(lines)


def _cells(row: PaperRow) -> list[str]:
    if row.deviations is None:
        return [str(value) for value in row.values]
    pairs = zip(row.values, row.deviations, strict=True)
    return [f"{value} ± {deviation}" for value, deviation in pairs]
