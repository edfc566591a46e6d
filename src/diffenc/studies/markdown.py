"""Tables and numbers as the pages of the studies write them."""

from collections.abc import Sequence

from diffenc.studies.results import Spread


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return [line(columns), line(["---"] * len(columns)), *(line(row) for row in rows)]


def section(name: str, lines: Sequence[str]) -> list[str]:
    """Lines that another page can include by name, as pymdownx.snippets does."""
    return [f"<!-- --8<-- [start:{name}] -->", "", *lines, "", f"<!-- --8<-- [end:{name}] -->"]


def number(spread: Spread | None, digits: int = 2, *, nothing: str = "") -> str:
    """Mean and deviation.

    Args:
        spread: Values over seeds; None gives `nothing`.
        digits: Number of digits after the point.
        nothing: Text that stands where there is no figure.
    """
    return nothing if spread is None else f"{spread.mean:.{digits}f}{_deviation(spread, digits)}"


def signed(spread: Spread | None, digits: int = 3, *, nothing: str = "") -> str:
    """Mean of a difference with its sign, and deviation; else as `number`."""
    return nothing if spread is None else f"{spread.mean:+.{digits}f}{_deviation(spread, digits)}"


def _deviation(spread: Spread, digits: int) -> str:
    return "" if spread.deviation is None else f" ± {spread.deviation:.{digits}f}"
