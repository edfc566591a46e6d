"""Features gathered where a word is seen: pure functions on feature maps and attention maps."""

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.denoiser.grids import to_grid

_LEAST = 1e-12


def gather(
    features: Float[Tensor, "b c h w"], weights: Float[Tensor, "b words mh mw"]
) -> Float[Tensor, "b words c"]:
    """Mean of feature vectors over cells, weighted by each word's map.

    Args:
        features: Feature map of a tap.
        weights: Maps of words, 0 or above, on any grid; they are brought to the features'. A map of
            zeros gives a token of zeros.
    """
    height, width = features.shape[-2:]
    shares = to_grid(weights, (height, width)).flatten(2)
    shares = shares / shares.sum(dim=-1, keepdim=True).clamp_min(_LEAST)
    cells = features.flatten(2).to(shares.dtype)
    return einsum(shares, cells, "b words n, b c n -> b words c").to(features.dtype)


def places(weights: Float[Tensor, "b words h w"]) -> Float[Tensor, "b words 4"]:
    """Where the maps of words lie: centre and spread.

    Args:
        weights: Maps of words, 0 or above; they are squared, so that their peaks count.

    Returns:
        Row and column of the centre and standard deviation along both, as shares of the side: 0 is
        the upper or left edge, 1 the lower or right one. The centre of a map of zeros is 0.
    """
    peaks = weights.square()
    shares = peaks / peaks.sum(dim=(-2, -1), keepdim=True).clamp_min(_LEAST)
    centres, spreads = [], []
    for axis, others in ((-2, -1), (-1, -2)):
        along = shares.sum(dim=others)
        count = weights.shape[axis]
        middles = (torch.arange(count, dtype=weights.dtype, device=weights.device) + 0.5) / count
        centre = (along * middles).sum(dim=-1)
        variance = (along * (middles - centre[..., None]).square()).sum(dim=-1)
        centres.append(centre)
        spreads.append(variance.clamp_min(0).sqrt())
    return torch.stack([*centres, *spreads], dim=-1)


def sharpest(
    weights: Float[Tensor, "b words h w"], present: Bool[Tensor, "b words"], count: int
) -> Bool[Tensor, "b words"]:
    """The words whose maps say most of where: those of least entropy.

    Args:
        weights: Maps of words, 0 or above.
        present: Mask of the words that there are.
        count: Number of words to keep per row; rows with fewer keep them all.
    """
    flat = rearrange(weights, "b words h w -> b words (h w)")
    shares = flat / flat.sum(dim=-1, keepdim=True).clamp_min(_LEAST)
    entropy = -(shares * shares.clamp_min(_LEAST).log()).sum(dim=-1)
    ranked = entropy.masked_fill(~present, torch.inf).argsort(dim=-1, stable=True)
    kept = torch.zeros_like(present).scatter(1, ranked[:, :count], True)
    return kept & present
