"""Pictures of the studies, by matplotlib: tables of coloured cells, and figures with deviations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffenc._optional import require
from diffenc.errors import ConfigError, ShapeError
from diffenc.studies.spreads import Spread

_COLORS = ("#0b6e99", "#c2571a", "#4f4f57", "#5b8c2a", "#8b3a8b", "#b8860b", "#d1495b", "#2a9d8f")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_NOTHING = "#e8e8ec"
_GUESSING = "#8a8a94"
_LIGHT = 0.62
"""Cells above it, of 0 to 1, are light enough for dark letters."""


@dataclass(frozen=True, slots=True)
class CellTable:
    """Table of numbers, each in a cell that is coloured by it.

    Attributes:
        title: Title above the table.
        values: Numbers of the cells, one row per row label; None leaves a cell grey.
        low: Value that gets the darkest colour.
        high: Value that gets the lightest colour.
        logarithmic: Whether colours follow the logarithm of the values.
    """

    title: str
    values: Sequence[Sequence[float | None]]
    low: float
    high: float
    logarithmic: bool = False

    def unit(self, value: float) -> float:
        """Place of a value between `low` and `high`, 0 to 1."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-9))
        return min(max((value - low) / (high - low), 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Series:
    """Figures that share a colour, a mark and a line of the legend.

    Attributes:
        label: Name of the series in the legend.
        places: Place of each figure on the horizontal axis.
        figures: Figures, which are drawn as mean and deviation.
    """

    label: str
    places: Sequence[float]
    figures: Sequence[Spread]


@dataclass(frozen=True, slots=True)
class Panel:
    """Series over an axis of names or of numbers.

    Attributes:
        title: Title above the panel.
        unit: Unit of the vertical axis.
        series: Series of the panel, in the order of their colours.
        names: Names at the places 0, 1, 2 and so on of the horizontal axis, whose points have no
            line; () takes whole numbers from 1, whose points are joined.
        axis: Label of the horizontal axis.
        joined: Whether points over names have a line, as those over rising numbers.
        guessing: What guessing reaches, drawn as a broken line; None draws none.
        logarithmic: Whether the horizontal axis of numbers is logarithmic, with a tick at every
            place of a point.
    """

    title: str
    unit: str
    series: Sequence[Series]
    names: Sequence[str] = ()
    axis: str = ""
    joined: bool = False
    guessing: float | None = None
    logarithmic: bool = False


def need_charts() -> None:
    """Find out before anything is computed whether pictures can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib.figure", extra="viz")


def draw_cells(
    tables: Sequence[Sequence[CellTable | None]],
    path: Path,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    note: str,
) -> None:
    """Draw tables of equal rows and columns side by side and under each other.

    Args:
        tables: Lines of tables from top to bottom; None leaves a place empty.
        path: Path of the picture file to write.
        rows: Row labels, written once at the left of each line of tables.
        columns: Column labels, written under each table.
        title: Text over all tables.
        note: Text under all tables.

    Raises:
        ConfigError: No table, or one whose range is empty.
        ShapeError: A table that does not fit the labels.
        MissingExtraError: matplotlib is not installed.
    """
    present = [table for line in tables for table in line if table is not None]
    if not present:
        raise ConfigError("a chart needs one table or more, got none")
    for table in present:
        _check(table, rows, columns)
    across = max(map(len, tables))
    width = max(3.0, 0.6 * len(columns)) * across + 0.09 * max(map(len, rows))
    height = (0.26 * len(rows) + 0.75) * len(tables)
    figure = _figure(width, height + 1.2)
    grid = figure.subplots(len(tables), across, squeeze=False)
    for line, panels in zip(tables, grid, strict=True):
        for panel, cells in zip(panels, [*line, *[None] * (across - len(line))], strict=True):
            if cells is None:
                panel.set_axis_off()
                continue
            _fill(panel, cells)
            panel.set_xticks(range(len(columns)), columns)
            panel.set_yticks(range(len(rows)), rows if panel is panels[0] else [""] * len(rows))
    figure.suptitle(title, fontsize=14)
    figure.supxlabel(note, fontsize=8, color="#5f5f66", wrap=True)
    figure.savefig(path, dpi=110)


def draw_panels(
    panels: Sequence[Panel], path: Path, *, title: str, across: int | None = None
) -> None:
    """Draw panels side by side, in rows; bars are one sample deviation.

    Args:
        panels: Panels from left to right, row by row.
        path: Path of the picture file to write.
        title: Text over all panels.
        across: Number of panels in a row; None puts all in one.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    width = max(5.6, 1.3 * max((len(panel.names) for panel in panels), default=0))
    columns = max(1, len(panels) if across is None else across)
    rows = max(1, -(-len(panels) // columns))
    figure = _figure(width * columns, 4.8 * rows)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for place, panel in zip(places, panels, strict=False):
        _plot(place, panel)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", extra="viz").Figure((width, height), layout="constrained")


def _check(table: CellTable, rows: Sequence[str], columns: Sequence[str]) -> None:
    shape = [len(values) for values in table.values]
    if shape != [len(columns)] * len(rows):
        raise ShapeError(
            f"{table.title!r} has rows of {shape} values for {len(rows)} rows of {len(columns)}"
        )
    if not table.low < table.high or (table.logarithmic and table.low <= 0):
        raise ConfigError(
            f"{table.title!r} goes from {table.low} to {table.high}: low must be below high, and "
            "above 0 for logarithms"
        )


def _fill(panel: Any, table: CellTable) -> None:
    units = [[math.nan if v is None else table.unit(v) for v in row] for row in table.values]
    panel.set_facecolor(_NOTHING)
    panel.imshow(units, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    panel.set_title(table.title, fontsize=10, loc="left")
    panel.tick_params(length=0, labelsize=8)
    for row, values in enumerate(table.values):
        for column, value in enumerate(values):
            if value is not None:
                ink = "black" if units[row][column] > _LIGHT else "white"
                centre = {"ha": "center", "va": "center", "fontsize": 8}
                panel.text(column, row, f"{value:.2f}", color=ink, **centre)


def _plot(place: Any, panel: Panel) -> None:
    for index, series in enumerate(panel.series):
        place.errorbar(
            series.places,
            [spread.mean for spread in series.figures],
            yerr=[spread.deviation or 0.0 for spread in series.figures],
            color=_COLORS[index % len(_COLORS)],
            marker=_MARKS[index % len(_MARKS)],
            linewidth=1.2,
            linestyle="none" if panel.names and not panel.joined else "solid",
            capsize=3,
            label=series.label,
        )
    if panel.guessing is not None:
        place.axhline(panel.guessing, color=_GUESSING, linestyle="--", label="guessing")
    place.set_title(panel.title)
    place.set_ylabel(panel.unit)
    place.set_xlabel(panel.axis)
    if panel.names:
        place.set_xticks(range(len(panel.names)), panel.names, rotation=20, ha="right", fontsize=8)
        if panel.joined:  # lines run from side to side and leave no room
            place.tick_params(axis="x", rotation=0)
            place.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        else:
            place.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # hides no bar
    else:
        last = max((max(series.places) for series in panel.series), default=1)
        ticks: Sequence[float] = range(1, int(last) + 1)
        if panel.logarithmic:
            ticks = sorted({each for series in panel.series for each in series.places})
            place.set_xscale("log")
            place.minorticks_off()
        place.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        place.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))
