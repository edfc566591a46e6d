"""Successive halving: candidates that fall behind are not scored to the end."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.config import check_choice
from diffenc.errors import ConfigError

Step = tuple[int, int]
Candidates = Literal["texts", "images"]


def successive_halving(
    score: Callable[[Bool[Tensor, "images texts"], Step], Float[Tensor, "images texts"]],
    shape: tuple[int, int],
    steps: Sequence[Step],
    *,
    keep: int,
    candidates: Candidates = "texts",
) -> tuple[Float[Tensor, "images texts steps"], Bool[Tensor, "images texts"]]:
    """Score candidates step by step, and drop the worse half after each, down to `keep`.

    Those that are kept have every step scored, as without screening. Candidates compete by the mean
    of their scores so far: texts of an image with each other, or images of a text.

    Args:
        score: Function that returns the scores of the wanted pairs at a step, NaN elsewhere.
        shape: Number of images and of texts.
        steps: Steps, each a (timestep, draw); those in the middle are taken first.
        keep: Number of candidates that are scored to the end.
        candidates: Kind of candidates that compete: "texts" of an image, or "images" of a text.

    Returns:
        Scores, NaN where not computed, and which pairs were dropped.

    Raises:
        ConfigError: `keep` below 1, or unknown candidates.

    Source:
        Li et al. 2023 (Diffusion Classifier), arXiv:2303.16203, section 3.3: adaptive evaluation.
    """
    check_choice("screen_over", candidates, get_args(Candidates))
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ConfigError(f"screen must be an int of 1 or more candidates to keep, got {keep!r}")
    alive = torch.ones(shape, dtype=torch.bool, device="cpu")
    scores = torch.full((*shape, len(steps)), torch.nan, dtype=torch.float32, device="cpu")
    dim = 1 if candidates == "texts" else 0
    left = shape[dim]
    for done, index in enumerate(_middle_first(len(steps)), start=1):
        scores[..., index] = score(alive, steps[index])
        if done == len(steps) or left <= keep:
            continue
        left = max(keep, (left + 1) // 2)
        so_far = scores.nanmean(dim=-1).masked_fill(~alive, -torch.inf)
        best = so_far.argsort(dim=dim, descending=True, stable=True)
        chosen = best.narrow(dim, 0, left)
        alive = torch.zeros_like(alive).scatter(dim, chosen, True)
    return scores, ~alive


def _middle_first(count: int) -> list[int]:
    """Indices from the middle outwards: the ends of the schedule tell candidates apart least."""
    return sorted(range(count), key=lambda index: (abs(2 * index - count + 1), index))
