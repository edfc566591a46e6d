"""What is scored, the same for every contender, with what is to be reached."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from diffenc.scoring.config import ScorerConfig, scorer_preset

Kind = Literal["paper", "discffusion", "shared-query"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FLOOR_GOAL = 0.9
"""Least share of the time that the bare floor takes."""

SIZE, QUICK_SIZE = 512, 64
"""Sides of the pictures, in pixels; the latter for narrow models."""

_UNIT: Mapping[Kind, float] = {"paper": 2.8, "discffusion": 1.9, "shared-query": 5.0}
_MATRIX: Mapping[Kind, float] = {"shared-query": 40.0}


@dataclass(frozen=True, slots=True)
class ScoreCase:
    """One job.

    Attributes:
        name: On the command line and in JSON.
        title: In tables.
        model: Alias of the architecture.
        images: How many.
        texts: How many; every image is scored under each.
        goals: Kinds of score that are timed, and how many times faster each is to be than the
            released way.
    """

    name: str
    title: str
    model: str
    images: int = 2
    texts: int = 2
    goals: Mapping[Kind, float] = field(default_factory=lambda: _UNIT)

    @property
    def pairs(self) -> int:
        """Images times texts."""
        return self.images * self.texts


@dataclass(slots=True)
class ScoreQuestion:
    """Pictures as a data loader gives them, and texts.

    Attributes:
        images: (images 3 height width), uint8.
        texts: Distinct.
    """

    images: Tensor
    texts: list[str]


SCORE_CASES = {
    case.name: case
    for case in (
        ScoreCase("sd2.1-unit", "SD 2.1 at 512 px: 2 images x 2 texts, 5 timesteps", "sd2.1-base"),
        ScoreCase(
            "sd2.1-matrix",
            "SD 2.1 at 512 px: 8 images x 32 texts, 5 timesteps",
            "sd2.1-base",
            images=8,
            texts=32,
            goals=_MATRIX,
        ),
        ScoreCase("sdxl-unit", "SDXL at 512 px: 2 images x 2 texts, 5 timesteps", "sdxl"),
        ScoreCase(
            "sdxl-matrix",
            "SDXL at 512 px: 8 images x 32 texts, 5 timesteps",
            "sdxl",
            images=8,
            texts=32,
            goals=_MATRIX,
        ),
    )
}


def score_config(kind: Kind, *, quick: bool, batch_size: int, short: bool = False) -> ScorerConfig:
    """What the scorer is told.

    Args:
        kind: A preset, or "paper" by shared queries.
        quick: Small pictures.
        batch_size: Rows per call of the U-Net.
        short: One timestep in place of five, to compare scores by.
    """
    options = scorer_preset("discffusion" if kind == "discffusion" else "paper")
    if kind == "shared-query":
        options["mode"] = kind
    if short:
        options["timesteps"] = (389,)
    # SDXL's rule would be zeros, of which no published score knows.
    options |= {"size": QUICK_SIZE if quick else SIZE, "batch_size": batch_size, "uncond": "empty"}
    return ScorerConfig.from_dict(options)


def ask_scores(case: ScoreCase, index: int, *, size: int) -> ScoreQuestion:
    """Question number `index` of a case: always other pictures and other texts.

    Args:
        case: How many of both.
        index: Equal numbers are equal questions.
        size: Side of the pictures, in pixels.
    """
    number = 1000 * case.images + index  # nor may two cases share any
    generator = torch.Generator().manual_seed(number)
    shape = (case.images, 3, size, size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    texts = [
        f"object {number} is left of object {row} in this picture" for row in range(case.texts)
    ]
    return ScoreQuestion(images, texts)
