"""Results of the study of the parts, as plain values."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, Literal, get_args

from diffenc.studies.results import Spread
from diffenc.studies.trials import Property

Part = Literal[
    "uncond",
    "cond",
    "concat",
    "clip",
    "clip+uncond",
    "clip+cond",
    "lora",
    "lora-empty",
    "captioner",
]
PARTS: tuple[Part, ...] = get_args(Part)

Reader = Literal["told", "blind"]
READERS: tuple[Reader, ...] = get_args(Reader)

ASKED: tuple[Property, ...] = ("color", "shape", "position")
"""Properties that the questions ask for."""

COMPARISONS: tuple[tuple[Part, Part], ...] = (
    ("cond", "uncond"),
    ("concat", "uncond"),
    ("concat", "cond"),
    ("clip+cond", "clip"),
    ("clip+cond", "cond"),
    ("clip+cond", "clip+uncond"),
    ("lora", "cond"),
    ("lora-empty", "uncond"),
    ("lora", "lora-empty"),
    ("captioner", "uncond"),
)
"""Pairs of a part and the part that it is compared with."""


@dataclass(frozen=True, slots=True)
class PartRow:
    """Accuracy of reading answers from the tokens of one part.

    Attributes:
        part: Name of the part whose tokens are read.
        reader: Kind of reader: "told" knows the question, as a language model does; "blind" knows
            only which property is asked for, so the tokens must say which object is meant.
        accuracy: Accuracy for each property, 0 to 1, on scenes that the reader was not fitted to.
    """

    part: Part
    reader: Reader
    accuracy: dict[Property, Spread]

    @property
    def mean(self) -> Spread:
        """Mean over properties, per seed."""
        seeds = zip(*(spread.values for spread in self.accuracy.values()), strict=True)
        return Spread(tuple(mean(values) for values in seeds))


@dataclass(frozen=True, slots=True)
class NormRow:
    """Accuracy of a probe of cells behind a projector with or without a layer norm per tap.

    Attributes:
        scales: Factor that each tap's features are multiplied by before the projector.
        norm: Whether the projector has a layer norm per tap.
        accuracy: Share of held-out cells whose object is named rightly, 0 to 1.
    """

    scales: tuple[float, ...]
    norm: bool
    accuracy: Spread


@dataclass(frozen=True, slots=True)
class PartStudy:
    """Results of the study.

    Attributes:
        model: Name of the backbone.
        clip: Name of the CLIP model; None if none was used.
        taps: Places in the U-Net that the encoder reads.
        rows: Accuracy of each part and reader.
        norms: Accuracy with and without layer norms in the projector.
        rms: Root mean square of each tap's features, mean over seeds.
        chance: Share of the most frequent answer among the test questions, for each property, 0 to
            1.
        missing: Reason why a part was not studied, by name of the part.
        settings: Settings of the run, such as numbers of scenes, seeds and epochs.
    """

    model: str
    clip: str | None
    taps: tuple[str, ...]
    rows: tuple[PartRow, ...]
    norms: tuple[NormRow, ...]
    rms: tuple[float, ...]
    chance: dict[Property, float]
    missing: dict[Part, str]
    settings: dict[str, Any]

    def find(self, part: Part, reader: Reader) -> PartRow | None:
        """Row of a part and reader; None if the part was not studied."""
        for row in self.rows:
            if (row.part, row.reader) == (part, reader):
                return row
        return None

    def gain(self, part: Part, base: Part, reader: Reader) -> Spread | None:
        """Mean accuracy of a part minus that of another, per seed."""
        over, under = self.find(part, reader), self.find(base, reader)
        if over is None or under is None:
            return None
        pairs = zip(over.mean.values, under.mean.values, strict=True)
        return Spread(tuple(first - second for first, second in pairs))

    def lora_by_text(self, reader: Reader) -> Spread | None:
        """Gain of LoRA with the question minus its gain with the empty prompt, per seed."""
        asked, empty = self.gain("lora", "cond", reader), self.gain("lora-empty", "uncond", reader)
        if asked is None or empty is None:
            return None
        pairs = zip(asked.values, empty.values, strict=True)
        return Spread(tuple(first - second for first, second in pairs))

    @property
    def parts(self) -> Sequence[Part]:
        """Parts that were studied."""
        found = {row.part for row in self.rows}
        return [part for part in PARTS if part in found]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them, with the gains."""
        gains = [
            {"part": part, "base": base, "reader": reader, "values": spread.values}
            for part, base in COMPARISONS
            for reader in READERS
            if (spread := self.gain(part, base, reader)) is not None
        ]
        return {**asdict(self), "gains": gains}
