"""Weights of layers from items whose truth is known: for a validation split, never the test's."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc.errors import ShapeError

_STEPS, _RIDGE = 2000, 1e-2


def margins(
    layer_scores: Float[Tensor, "items layers n n"],
) -> Float[Tensor, "comparisons layers"]:
    """Margin by which each layer scores a right pair above a wrong one, for every comparison.

    Args:
        layer_scores: Scores of items with n images and n texts each, where text k fits image k.

    Raises:
        ShapeError: No item, or not as many texts as images, or fewer than two.
    """
    if layer_scores.ndim != 4 or not len(layer_scores) or layer_scores.shape[2] < 2:
        raise ShapeError(
            "layer scores must be (items, layers, n, n) with one item and two images or more, got "
            f"{tuple(layer_scores.shape)}"
        )
    count = layer_scores.shape[2]
    if layer_scores.shape[3] != count:
        raise ShapeError(f"items need as many texts as images, got {tuple(layer_scores.shape)}")
    right = layer_scores.diagonal(dim1=2, dim2=3)[..., None]
    wrong = ~torch.eye(count, dtype=torch.bool, device="cpu")
    per_text = (right - layer_scores)[:, :, wrong]  # an image under its text and another
    per_image = (right - layer_scores.mT)[:, :, wrong]  # a text with its image and another
    return torch.cat([per_text, per_image], dim=2).transpose(1, 2).flatten(0, 1)


def fit_layer_weights(
    layer_scores: Float[Tensor, "items layers n n"],
) -> tuple[float, ...]:
    """Weights, 0 or above and of sum 1, under which right pairs score above wrong ones.

    A logistic regression on the margins, without intercept and with a little ridge: convex, so the
    result depends on nothing but the scores. Layers are brought to one scale first. Where no layer
    tells right from wrong, all weights are equal, with a warning.

    Args:
        layer_scores: Scores of validation items, see `CrossAttnScorer.layer_scores`.

    Raises:
        ShapeError: See `margins`.
    """
    gaps = margins(layer_scores).double()
    scale = gaps.square().mean(dim=0).sqrt()
    usable = scale > 0
    scaled = gaps / scale.where(usable, 1.0)
    # The gradient's Lipschitz constant: a step of its inverse never overshoots.
    bound = torch.linalg.matrix_norm(scaled, 2) ** 2 / (4 * len(scaled)) + 2 * _RIDGE
    weights = torch.zeros(len(scale), dtype=torch.float64, device="cpu")
    for _ in range(_STEPS):
        missed = torch.sigmoid(-scaled @ weights)
        gradient = -(scaled * missed[:, None]).mean(dim=0) + 2 * _RIDGE * weights
        weights = (weights - gradient / bound).clamp(min=0)
    applied = (weights / scale.where(usable, 1.0)) * usable
    if applied.sum() <= 0:
        warnings.warn(
            "no layer tells right pairs from wrong ones; all weights are equal", stacklevel=2
        )
        applied = torch.ones_like(applied)
    return tuple((applied / applied.sum()).tolist())
