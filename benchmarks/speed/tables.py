"""Measured rows as a table on the terminal, as JSON and as Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from speed.cases import OVERHEAD_GOAL

Tables = Sequence[tuple[str, Sequence[Sequence[str]]]]
"""Titles, and rows of cells."""

R = TypeVar("R", bound="MeasuredRow")


@dataclass(slots=True, kw_only=True)
class MeasuredRow:
    """One contender on one case, whatever is measured.

    Attributes:
        case: Its name.
        title: What is asked.
        contender: Who answers.
        seconds: Median of the timed calls.
        calls: All of them.
        unet_rows: Rows that went through the U-Net, see `speed.counting`.
        vae_pictures: Pictures that went through the VAE.
        texts: Texts that went through the text encoder, by the first one where there are two.
        operations: Floating point operations of all that.
        share: Of the measured rate of a large matrix product.
        speedup: How many times faster than the rival.
        goal: Of the speedup; None where there is none.
    """

    case: str
    title: str
    contender: str
    seconds: float
    calls: list[float]
    unet_rows: int
    vae_pictures: int
    texts: int
    operations: int
    share: float
    speedup: float | None = None
    goal: float | None = None

    @property
    def goal_met(self) -> bool | None:
        """Whether the speedup reaches its goal; None without one."""
        return None if self.goal is None or self.speedup is None else self.speedup >= self.goal

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, with whether its goal was met."""
        return {**asdict(self), "goal_met": self.goal_met}


@dataclass(slots=True, kw_only=True)
class Row(MeasuredRow):
    """What the encoder, or a rival of it, costs.

    Attributes:
        batch: Pictures per call.
        images_per_second: Pictures, whatever the number of passes.
        peak_bytes: Most memory during a call, weights included; None where it was not measured.
        peak_truncated_bytes: The same of diffenc with `truncate=True`.
        difference: From diffenc's features, relative to the tap's largest magnitude.
        overhead: Time beyond the floor's, as a share of it.
    """

    batch: int
    images_per_second: float
    peak_bytes: int | None = None
    peak_truncated_bytes: int | None = None
    difference: float = 0.0
    overhead: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, with whether its goals were met."""
        low = None if self.overhead is None else self.overhead <= OVERHEAD_GOAL
        return {**MeasuredRow.to_dict(self), "overhead_met": low}


COLUMNS = (
    "contender",
    "batch",
    "time",
    "images/s",
    "speed-up",
    "over floor",
    "U-Net",
    "VAE",
    "texts",
    "TFLOP",
    "share",
    "peak memory",
)


def print_rows(rows: Sequence[Row], head: str, notes: Sequence[str], console: Console) -> None:
    """A table per case."""
    print_tables(COLUMNS, sections(rows, cells), head, (*explanation(), *notes), console)


def markdown(rows: Sequence[Row], head: str, notes: Sequence[str]) -> str:
    """The same table as text."""
    return markdown_tables(COLUMNS, sections(rows, cells), head, (*explanation(), *notes))


def print_tables(
    columns: Sequence[str], tables: Tables, head: str, lines: Sequence[str], console: Console
) -> None:
    """Tables of one width under a head, the first column to the left, and lines behind them."""
    console.print(head, style="bold", markup=False, highlight=False)
    every = [columns, *(cells for _, members in tables for cells in members)]
    widths = [max(len(cells[place]) for cells in every) for place in range(len(columns))]
    for title, members in tables:
        table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
        for column, width in zip(columns, widths, strict=True):
            side: Literal["left", "right"] = "left" if column == columns[0] else "right"
            table.add_column(column, justify=side, min_width=width)
        for cells in members:
            table.add_row(*cells)
        console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False)


def markdown_tables(columns: Sequence[str], tables: Tables, head: str, lines: Sequence[str]) -> str:
    """The same as text."""
    text = [f"# {head}", ""]
    for title, members in tables:
        text += [f"## {title}", "", f"| {' | '.join(columns)} |"]
        text += ["|---|" + "---:|" * (len(columns) - 1)]
        text += [f"| {' | '.join(cells)} |" for cells in members]
        text += [""]
    return "\n".join([*text, *(f"* {line}" for line in lines), ""])


def explanation() -> tuple[str, ...]:
    """How to read the columns."""
    return (
        "time: median of calls that took turns; ratios are medians over rounds of such calls.",
        "speed-up: of diffenc over the plain script, with its goal; of compiled over eager.",
        "over floor: time beyond that of the same calls of the model by hand; the goal is "
        f"{OVERHEAD_GOAL:.0%} or less.",
        "U-Net, VAE, texts: rows that one call puts through each.",
        "TFLOP: their arithmetic; share: of the measured rate of a large matrix product.",
        "peak memory: during a call, weights included; in brackets with truncate=True.",
    )


def sections(rows: Sequence[R], cells: Callable[[R], Sequence[str]]) -> Tables:
    """Rows by case, in order."""
    titles = dict.fromkeys(row.title for row in rows)
    return [(title, [cells(row) for row in rows if row.title == title]) for title in titles]


def cells(row: Row) -> tuple[str, ...]:
    """What a row shows."""
    return (
        row.contender,
        str(row.batch),
        duration(row.seconds),
        f"{row.images_per_second:.3g}",
        told_speedup(row),
        "" if row.overhead is None else f"{row.overhead:+.1%}",
        *work_cells(row),
        _memory(row),
    )


def duration(seconds: float) -> str:
    """In seconds or milliseconds."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def told_speedup(row: MeasuredRow) -> str:
    """How many times faster, with the goal."""
    if row.speedup is None:
        return ""
    if row.goal_met is None:
        return f"{row.speedup:.2f}x"
    return f"{row.speedup:.2f}x ({row.goal:.1f}x {'met' if row.goal_met else 'missed'})"


def work_cells(row: MeasuredRow) -> tuple[str, ...]:
    """Under the columns U-Net, VAE, texts, TFLOP and share."""
    return (
        str(row.unet_rows),
        str(row.vae_pictures),
        str(row.texts),
        f"{row.operations / 1e12:.3g}",
        f"{row.share:.0%}",
    )


def _memory(row: Row) -> str:
    if row.peak_bytes is None:
        return ""
    whole = f"{row.peak_bytes / 1e9:.2f} GB"
    if row.peak_truncated_bytes is None:
        return whole
    return f"{whole} ({row.peak_truncated_bytes / 1e9:.2f})"
