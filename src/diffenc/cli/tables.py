"""Tables: drawn with lines on a terminal, plain and uncut anywhere else."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as DrawnTable

if TYPE_CHECKING:
    from diffenc.evals.tables import Table


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Sequence[str] = (),
) -> None:
    """Print rows under a title.

    Args:
        title: Title of the table.
        columns: Headings of the columns.
        rows: Rows of cells, converted to text by `str`.
        right: Headings of the columns that are aligned to the right.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        _print_plain(title, columns, texts, right)
        return
    drawn = DrawnTable(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in columns:
        drawn.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for text in texts:
        drawn.add_row(*text)
    Console(markup=False, emoji=False, highlight=False).print(drawn)


def print_tables(tables: "Sequence[Table]", notes: Sequence[str] = ()) -> None:
    """Print tables, then notes on standard error."""
    for table in tables:
        print_table(table.title, table.columns, table.rows, right=table.numeric)
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def _print_plain(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]
) -> None:
    lines = [columns, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    typer.echo(title)
    for line in lines:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        typer.echo(f"  {'  '.join(cells)}".rstrip())
    typer.echo()


def readable_bytes(count: int) -> str:
    """Bytes as file listings have them: ``"13.7 kB"``, ``"5.1 GB"``."""
    size, unit = count / 1e3, "kB"
    for larger in ("MB", "GB", "TB"):
        if size >= 1e3:
            size, unit = size / 1e3, larger
    return f"{size:.1f} {unit}"
