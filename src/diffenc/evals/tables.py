"""Tables whose cells are text: for a terminal, and as Markdown."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """Table whose cells are text.

    Attributes:
        title: Description of the content.
        columns: Headings of the columns; the first is that of the models.
        rows: Rows of the table, each with one text per column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_markdown(self) -> str:
        """Convert to Markdown, with numbers aligned to the right."""
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        body = "\n".join(
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
        )
        return f"**{self.title}**\n\n{body}\n"

    def transposed(self, head: str) -> "Table":
        """Swap rows and columns; `head` is the heading of the new first column."""
        names = tuple(row[0] for row in self.rows)
        rows = tuple(
            (column, *(row[index] for row in self.rows))
            for index, column in enumerate(self.columns[1:], start=1)
        )
        return Table(self.title, (head, *names), rows)
