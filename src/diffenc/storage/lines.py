"""Tables as text: a JSON object per line, and CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from diffenc.errors import ConfigError, DiffencError
from diffenc.storage.reading import parse_json, text_lines


def parse_json_lines(
    text: str, *, where: str
) -> tuple[list[tuple[int, dict[str, Any]]], list[tuple[int, str]]]:
    """Objects of a text with one per line, and what is wrong with the lines that hold none.

    Args:
        text: Text in JSON lines; empty lines are skipped.
        where: Place of the text, for messages.

    Returns:
        Both with the number of the line, which counts from 1.
    """
    objects, broken = [], []
    for number, line in enumerate(text_lines(text), start=1):
        if not line.strip():
            continue
        try:
            objects.append((number, parse_json(line, where=f"{where}, line {number}")))
        except DiffencError as error:
            broken.append((number, str(error)))
    return objects, broken


def parse_csv(
    text: str, *, where: str, error: type[DiffencError] = ConfigError
) -> list[tuple[int, list[str]]]:
    """Rows of a CSV text, each with the number of its last line; empty ones are left out.

    Quoted commas and line breaks are part of a value.

    Raises:
        DiffencError: `error`: a quote is not closed, or a value is longer than 131,072 characters.
    """
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [(lines.line_num, cells) for cells in lines if any(map(str.strip, cells))]
    except csv.Error as failure:
        raise error(f"{where}, line {lines.line_num} is no CSV: {failure}") from failure


def format_csv(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A CSV text with a header; values with commas, quotes or line breaks are quoted."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
