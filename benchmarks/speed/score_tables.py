"""Measured rows of scores as a table on the terminal, as JSON and as Markdown."""

from dataclasses import dataclass
from typing import Any

from speed.score_cases import FLOOR_GOAL
from speed.tables import MeasuredRow, duration, told_speedup, work_cells


@dataclass(slots=True, kw_only=True)
class ScoreRow(MeasuredRow):
    """What the scores of all pairs cost, counts and seconds alike.

    Attributes:
        pairs: Images times texts.
        timed_pairs: How many of them were timed; the time of all is that, multiplied. `calls` are
            of these.
        passes: Share of the time that the bare U-Net passes take.
        floor: The same with texts and each picture once through the VAE.
        difference: From the released way's score of one pair and timestep, relative to it.
    """

    pairs: int
    timed_pairs: int
    passes: float | None = None
    floor: float | None = None
    difference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, with whether its goals were met."""
        near = None if self.floor is None else self.floor >= FLOOR_GOAL
        return {**MeasuredRow.to_dict(self), "floor_met": near}


COLUMNS = (
    "contender",
    "time",
    "ms per pair",
    "speed-up",
    "of floor",
    "passes alone",
    "U-Net",
    "VAE",
    "texts",
    "TFLOP",
    "share",
)


def explanation() -> tuple[str, ...]:
    """How to read the columns."""
    return (
        "time: of all pairs, median of calls that took turns; ratios are medians over rounds.",
        "released way: timed on as many pairs as its name says, and multiplied.",
        "speed-up: over the released way, with its goal.",
        "of floor: share of the time that the bare floor takes (U-Net passes on tensors that lie "
        f"ready, the texts, and the VAE once per picture); the goal is {FLOOR_GOAL:.0%} or more. "
        "passes alone: the same without texts and VAE.",
        "U-Net, VAE, texts: rows that go through each for all pairs.",
        "TFLOP: their arithmetic; share: of the measured rate of a large matrix product.",
    )


def cells(row: ScoreRow) -> tuple[str, ...]:
    """What a row shows."""
    some = "" if row.timed_pairs == row.pairs else f", {row.timed_pairs} of {row.pairs} pairs"
    return (
        f"{row.contender}{some}",
        duration(row.seconds),
        f"{1e3 * row.seconds / row.pairs:.3g}",
        told_speedup(row),
        "" if row.floor is None else f"{row.floor:.0%}",
        "" if row.passes is None else f"{row.passes:.0%}",
        *work_cells(row),
    )
