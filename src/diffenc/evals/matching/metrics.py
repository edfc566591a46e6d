"""Text, image and group score of items with two pictures and two captions."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.errors import NonFiniteError, ShapeError
from diffenc.evals.matching.base import Average, Item
from diffenc.evals.results import Result, mean

Metric = Literal["text", "image", "group"]
METRICS: tuple[Metric, ...] = get_args(Metric)

CHANCE: Mapping[Metric, float] = {"text": 25.0, "image": 25.0, "group": 100 / 6}
"""Percent that independent scores reach: of 24 orders of four numbers 6, 6 and 4 are right."""


def correct(scores: Float[Tensor, "..."]) -> dict[Metric, Bool[Tensor, "*trials items"]]:
    """Decide which items are right; a tie is wrong.

    Args:
        scores: Scores (..., items, 2 pictures, 2 captions), higher is better; caption k belongs to
            picture k.

    Returns:
        "text": each picture prefers its own caption. "image": each caption prefers its own picture,
        as MMVP-VLM's own evaluation asks. "group": both.

    Raises:
        ShapeError: The last two axes are not two pictures and two captions.
        NonFiniteError: Scores are NaN or infinity.

    Source:
        Thrush et al. 2022 (Winoground), arXiv:2204.03162, section 4.
    """
    if scores.ndim < 3 or scores.shape[-2:] != (2, 2):
        raise ShapeError(
            f"scores must be (..., items, 2 pictures, 2 captions), got {tuple(scores.shape)}"
        )
    if not bool(scores.isfinite().all()):  # NaN is neither above nor below, and would be wrong
        raise NonFiniteError("scores hold NaN or infinity")
    s = scores
    text = (s[..., 0, 0] > s[..., 0, 1]) & (s[..., 1, 1] > s[..., 1, 0])
    image = (s[..., 0, 0] > s[..., 1, 0]) & (s[..., 1, 1] > s[..., 0, 1])
    return {"text": text, "image": image, "group": text & image}


def tied(scores: Float[Tensor, "*trials items 2 2"]) -> Bool[Tensor, " items"]:
    """Find items with two equal scores that are compared, in any trial."""
    s = scores.flatten(0, -4) if scores.ndim > 3 else scores[None]
    equal = (s[..., :, 0] == s[..., :, 1]).any(dim=-1) | (s[..., 0, :] == s[..., 1, :]).any(dim=-1)
    return equal.any(dim=0)


Results = Mapping[Metric, Result]


def overall(
    right: Mapping[Metric, Bool[Tensor, "trials items"]],
    items: Sequence[Item],
    *,
    average: Average,
    label_kind: str,
) -> Results:
    """Percentages over all items, or as the mean over labels where the benchmark says so."""
    split = by_label(right, items, label_kind)
    if average == "items" or not split:
        return {metric: _result(values) for metric, values in right.items()}
    return {metric: _mean_of([results[metric] for results in split.values()]) for metric in METRICS}


def by_label(
    right: Mapping[Metric, Bool[Tensor, "trials items"]], items: Sequence[Item], kind: str
) -> dict[str, Results]:
    """Percentages per label of a kind, in the order in which labels occur."""
    names = dict.fromkeys(label for item in items for label in item.labels.get(kind, ()))
    results: dict[str, Results] = {}
    for name in names:
        rows = torch.tensor(
            [name in item.labels.get(kind, ()) for item in items], dtype=torch.bool, device="cpu"
        )
        results[name] = {metric: _result(values[:, rows]) for metric, values in right.items()}
    return results


def _result(right: Bool[Tensor, "trials items"]) -> Result:
    percent = right.double().mean(dim=1) * 100
    return Result(tuple(percent.tolist()), right.shape[1])


def _mean_of(results: Sequence[Result]) -> Result:
    trials = zip(*(result.trials for result in results), strict=True)
    return Result(tuple(mean(values) for values in trials), sum(r.items for r in results))
