"""A table of numbers as a picture: one coloured cell per number, with its value in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffenc.errors import ConfigError, ShapeError
from diffenc.viz.figure import wrap
from diffenc.viz.heatmap import colorize

_INK, _FAINT, _PAPER, _NOTHING = (28, 28, 32), (95, 95, 102), (255, 255, 255), (232, 232, 236)
_CELL = (58, 26)  # width, height in pixels
_GAP = 26
_LETTERS, _SMALL = 14, 12
_LIGHT = 0.62
"""Cells above it, of 0 to 1, are light enough for dark letters."""


@dataclass(frozen=True, slots=True)
class CellTable:
    """One block of a chart.

    Attributes:
        title: Title above the block.
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
        low, high, value = (
            (np.log(number) for number in (self.low, self.high, max(value, 1e-9)))
            if self.logarithmic
            else (self.low, self.high, value)
        )
        return float(np.clip((value - low) / (high - low), 0, 1))


def cell_chart(
    tables: Sequence[Sequence[CellTable | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    note: str,
) -> Image.Image:
    """Set tables of equal rows and columns side by side and under each other.

    Args:
        tables: Lines of tables from top to bottom; None leaves a place empty.
        rows: Row labels, written once at the left of each line of tables.
        columns: Column labels, written under each table.
        title: Text over all tables.
        note: Text under all tables.

    Raises:
        ConfigError: No table, or one whose range is empty.
        ShapeError: A table that does not fit the labels.
    """
    present = [table for line in tables for table in line if table is not None]
    if not present:
        raise ConfigError("a chart needs one table or more, got none")
    for table in present:
        _check(table, rows, columns)
    labels = max(_width(label, _SMALL) for label in rows)
    block = (
        max(len(columns) * _CELL[0], *(_width(table.title, _LETTERS) for table in present)),
        len(rows) * _CELL[1],
    )
    across = max(len(line) for line in tables)
    width = 3 * _GAP + labels + across * (block[0] + _GAP)
    head, foot = _lines(title, 22, width - 2 * _GAP), _lines(note, _SMALL, width - 2 * _GAP)
    line_height = block[1] + 2 * (_LETTERS + 10) + _GAP
    height = 3 * _GAP + 30 * len(head) + 18 * len(foot) + len(tables) * line_height
    canvas = Image.new("RGB", (width, height), _PAPER)
    y = _write(canvas, head, (_GAP, _GAP), 22, 30, _INK) + _GAP // 2
    for line in tables:
        top = y + _LETTERS + 10
        for index, label in enumerate(rows):
            _right(canvas, label, (_GAP + labels, top + index * _CELL[1] + 5))
        for place, found in enumerate(line):
            if found is not None:
                x = 2 * _GAP + labels + place * (block[0] + _GAP)
                _draw(canvas, found, columns, (x, top))
        y += line_height
    _write(canvas, foot, (_GAP, y), _SMALL, 18, _FAINT)
    return canvas


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


def _draw(
    canvas: Image.Image, table: CellTable, columns: Sequence[str], corner: tuple[int, int]
) -> None:
    draw = ImageDraw.Draw(canvas)
    (x, top), (width, height) = corner, _CELL
    draw.text((x, top - _LETTERS - 8), table.title, font=_font(_LETTERS), fill=_INK)
    for row, values in enumerate(table.values):
        for column, value in enumerate(values):
            left, upper = x + column * width, top + row * height
            unit = 0.0 if value is None else table.unit(value)
            color = _NOTHING if value is None else tuple(colorize(np.array([[unit]]))[0, 0])
            draw.rectangle((left, upper, left + width - 2, upper + height - 2), fill=color)
            if value is not None:
                text = f"{value:.2f}"
                inset = (width - _width(text, _SMALL)) // 2
                ink = _INK if unit > _LIGHT else _PAPER
                draw.text((left + inset, upper + 5), text, font=_font(_SMALL), fill=ink)
    for column, label in enumerate(columns):
        inset = (width - _width(label, _SMALL)) // 2
        place = (x + column * width + inset, top + len(table.values) * height + 4)
        draw.text(place, label, font=_font(_SMALL), fill=_FAINT)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _width(text: str, size: int) -> int:
    return round(_font(size).getlength(text))


def _lines(text: str, size: int, width: int) -> list[str]:
    return wrap(text, _font(size), width)


def _right(canvas: Image.Image, text: str, place: tuple[int, int]) -> None:
    x, y = place
    draw = ImageDraw.Draw(canvas)
    draw.text((x - _width(text, _SMALL), y), text, font=_font(_SMALL), fill=_INK)


def _write(
    canvas: Image.Image,
    lines: Sequence[str],
    place: tuple[int, int],
    size: int,
    step: int,
    color: tuple[int, int, int],
) -> int:
    """Write lines; where the next one would stand."""
    x, y = place
    for line in lines:
        ImageDraw.Draw(canvas).text((x, y), line, font=_font(size), fill=color)
        y += step
    return y
