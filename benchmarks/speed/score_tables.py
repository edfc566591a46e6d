"""Measured rows of scores as a table on the terminal, as JSON and as Markdown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from speed.score_cases import FLOOR_GOAL
from speed.tables import Tables, duration


@dataclass(slots=True, kw_only=True)
class ScoreRow:
    """One contender on one case.

    Attributes:
        case: Its name.
        title: What is scored.
        contender: Who scores.
        pairs: Images times texts.
        timed_pairs: How many of them were timed; the time of all is that, multiplied.
        seconds: Of all pairs: median of the calls.
        calls: All of them, in seconds, for the pairs that were timed.
        unet_rows: Rows that went through the U-Net for all pairs.
        vae_pictures: Pictures that went through the VAE.
        texts: Texts that went through the text encoder, by the first one where there are two.
        operations: Floating point operations of these.
        share: Of the measured rate of a large matrix product.
        speedup: How many times faster than the released way.
        goal: Of the speedup; None where there is none.
        passes: Share of the time that the bare U-Net passes take.
        floor: The same with texts and each picture once through the VAE.
        difference: From the released way's score of one pair and timestep, relative to it.
    """

    case: str
    title: str
    contender: str
    pairs: int
    timed_pairs: int
    seconds: float
    calls: list[float]
    unet_rows: int
    vae_pictures: int
    texts: int
    operations: int
    share: float
    speedup: float | None = None
    goal: float | None = None
    passes: float | None = None
    floor: float | None = None
    difference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, with whether its goals were met."""
        met = None if self.goal is None or self.speedup is None else self.speedup >= self.goal
        near = None if self.floor is None else self.floor >= FLOOR_GOAL
        return {**asdict(self), "goal_met": met, "floor_met": near}


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


def tables(rows: Sequence[ScoreRow]) -> Tables:
    """Rows by case, as `speed.tables` prints them."""
    titles = dict.fromkeys(row.title for row in rows)
    return [(title, [cells(row) for row in rows if row.title == title]) for title in titles]


def cells(row: ScoreRow) -> tuple[str, ...]:
    """What a row shows."""
    some = "" if row.timed_pairs == row.pairs else f", {row.timed_pairs} of {row.pairs} pairs"
    return (
        f"{row.contender}{some}",
        duration(row.seconds),
        f"{1e3 * row.seconds / row.pairs:.3g}",
        _speedup(row),
        "" if row.floor is None else f"{row.floor:.0%}",
        "" if row.passes is None else f"{row.passes:.0%}",
        str(row.unet_rows),
        str(row.vae_pictures),
        str(row.texts),
        f"{row.operations / 1e12:.3g}",
        f"{row.share:.0%}",
    )


def _speedup(row: ScoreRow) -> str:
    if row.speedup is None:
        return ""
    if row.goal is None:
        return f"{row.speedup:.2f}x"
    verdict = "met" if row.speedup >= row.goal else "missed"
    return f"{row.speedup:.2f}x ({row.goal:.1f}x {verdict})"
