"""Tables whose cells are text: for a terminal, and as Markdown."""

from dataclasses import dataclass

_NUMBER = "+-–0123456789"
"""First characters of a number, or of the dash that stands for none; "" is in it too."""


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
        """Convert to Markdown, with columns of numbers aligned to the right."""
        numeric = self.numeric
        rule = ["---:" if column in numeric else "---" for column in self.columns]
        lines = [self.columns, rule, *self.rows]
        body = "\n".join(
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
        )
        return f"**{self.title}**\n\n{body}\n"

    @property
    def numeric(self) -> tuple[str, ...]:
        """Headings of the columns whose cells are numbers, or empty, all of them."""
        return tuple(
            column
            for index, column in enumerate(self.columns)
            if index and all(row[index][:1] in _NUMBER for row in self.rows)
        )

    def transposed(self, head: str) -> "Table":
        """Swap rows and columns; `head` is the heading of the new first column."""
        names = tuple(row[0] for row in self.rows)
        rows = tuple(
            (column, *(row[index] for row in self.rows))
            for index, column in enumerate(self.columns[1:], start=1)
        )
        return Table(self.title, (head, *names), rows)
