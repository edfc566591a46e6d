"""The table of docs/models.md, made of what the library knows of its models.

Prints the table; with --write it is put into the page. A test holds the page to it.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffenc.cli.info import describe as describe_parts
from diffenc.errors import TapError
from diffenc.models import describe, list_backbones
from diffenc.models.arithmetic import pass_operations
from diffenc.models.presets import PRESETS
from diffenc.models.sources import BackboneSource

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- models -->\n", "<!-- end -->\n"

SCORES = {"shapes": "62.7"}
"""Group score of `denoising-gap` on the miniature Winoground; real models were not measured."""

COLUMNS = (
    "alias",
    "family",
    "licence of the weights",
    "size, px",
    "denoiser, M",
    "all in float16",
    "GFLOP a pass",
    "score",
)


def main() -> None:
    if "--write" in sys.argv[1:]:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}", encoding="utf-8")
    else:
        print(table(), end="")


def table() -> str:
    rows = [_row(source) for source in list_backbones()]
    lines = [COLUMNS, ("---",) * 3 + ("---:",) * 5, *rows]
    places = [("alias", "default taps", "presets"), ("---",) * 3, *map(_places, list_backbones())]
    return f"{_markdown(lines)}\n{_markdown(places)}"


def _markdown(lines: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _places(source: BackboneSource) -> tuple[str, ...]:
    """Where a model is read."""
    architecture = describe(source.alias)
    presets = (name for name in PRESETS if _fits(architecture, name))
    return (
        f"`{source.alias}`",
        "<br>".join(f"`{tap}`" for tap in architecture.default_taps),
        ", ".join(f"`{name}`" for name in presets) or "–",
    )


def _row(source: BackboneSource) -> tuple[str, ...]:
    alias = source.alias
    facts, architecture = describe_parts(alias), describe(alias)
    parts = {part["name"]: part for part in facts["components"]}
    memory = sum(part["memory_bytes"]["float16"] for part in parts.values())
    size = f"{memory / 1e9:.1f} GB" if memory >= 1e9 else f"{memory / 1e6:.0f} MB"
    return (
        f"`{alias}`",
        facts["family"],
        source.licence,
        str(facts["default_size"]),
        f"{parts[architecture.denoiser]['parameters'] / 1e6:,.1f}",
        size,
        _gigaflops(architecture, facts["default_size"]),
        SCORES.get(alias, "–"),
    )


def _fits(architecture: Any, preset: str) -> bool:
    options = PRESETS[preset].get(architecture.family)
    if options is None:
        return False
    try:
        architecture.match_taps(options["taps"])
    except TapError:
        return False
    return True


def _gigaflops(architecture: Any, size: int) -> str:
    """Arithmetic of a whole pass of the denoiser, two for a multiplication and an addition."""
    whole, _ = pass_operations(architecture.denoiser_config, size // architecture.reduction)
    return f"{whole / 1e9:,.1f}"


if __name__ == "__main__":
    main()
