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


def number(spread: Spread | None) -> str:
    """Mean and deviation of a share; "" of nothing."""
    if spread is None:
        return ""
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.2f}"
    return f"{spread.mean:.2f}{deviation}"


def signed(spread: Spread | None) -> str:
    """Mean and deviation of a difference; "" of nothing."""
    if spread is None:
        return ""
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.3f}"
    return f"{spread.mean:+.3f}{deviation}"
