"""Features gathered where a word is seen: pure functions on feature maps and attention maps.

A map of shares sums to 1 over its cells, or is zero where there is no word.
"""

from collections.abc import Mapping, Sequence

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.denoiser.grids import to_grid

_LEAST = 1e-12


def as_shares(maps: Float[Tensor, "*b h w"], power: float = 1.0) -> Float[Tensor, "*b h w"]:
    """Maps divided by their sums.

    Args:
        maps: Maps with values of 0 or above.
        power: Exponent of the values before they are summed; above 1 peaks count for more.
    """
    if power != 1:
        highest = maps.amax(dim=(-2, -1), keepdim=True)
        ratios = maps / highest.clamp_min(_LEAST)  # small values would vanish
        there = ratios > 0  # the slope of a root is infinite at 0, and 0 times that is NaN
        maps = ratios.masked_fill(~there, 1).pow(power) * there
    sums = maps.sum(dim=(-2, -1), keepdim=True)
    # Gradients of a map of zeros would grow by 1 / _LEAST each time, until they are infinite.
    return maps / sums.masked_fill(sums == 0, 1).clamp_min(_LEAST)


def sharpness(shares: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b"]:
    """How much a map says of where: its divergence from the uniform map, in nats.

    It is 0 where all cells are equal and log(cells) where one cell has everything.
    """
    cells = shares.shape[-2] * shares.shape[-1]
    ratios = (shares * cells).clamp_min(_LEAST)  # xlogy(0, 0) is 0, but its gradient is NaN
    information: Tensor = torch.xlogy(shares, ratios).sum(dim=(-2, -1))
    return information.clamp_min(0)


def join_layers(layers: Sequence[Float[Tensor, "b words _h _w"]]) -> Float[Tensor, "b words h w"]:
    """One map per word of the maps of several cross-attentions.

    Each layer counts for a word by the sharpness of its map there, so that layers that look
    everywhere have no say. The mean is taken on the finest grid.

    Args:
        layers: Attention probabilities of the words at each layer.

    Returns:
        Shares of the cells; zeros for a word of zeros.
    """
    shares = [as_shares(maps) for maps in layers]
    finest = max(((m.shape[-2], m.shape[-1]) for m in shares), key=lambda grid: grid[0] * grid[1])
    weights = torch.stack([sharpness(maps) for maps in shares]).clamp_min(_LEAST)
    weights = weights / weights.sum(dim=0)
    grown = torch.stack([as_shares(to_grid(maps, finest)) for maps in shares])
    return einsum(weights, grown, "layers b words, layers b words h w -> b words h w")


def gather(
    features: Float[Tensor, "b c h w"], shares: Float[Tensor, "b words _h _w"]
) -> Float[Tensor, "b words c"]:
    """Mean of feature vectors over cells, weighted by each word's map.

    The sum is taken in float32 and returned in the dtype of the features.

    Args:
        features: Feature map of a tap.
        shares: Maps of words on any grid; they are brought to the features'. A map of zeros gives a
            token of zeros.
    """
    with torch.autocast(features.device.type, enabled=False):
        weights = as_shares(to_grid(shares, (features.shape[-2], features.shape[-1])))
        gathered = einsum(weights, features.to(weights.dtype), "b words h w, b c h w -> b words c")
    return gathered.to(features.dtype)


def places(shares: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b 4"]:
    """Where maps lie: centre and spread.

    Args:
        shares: Maps of words.

    Returns:
        Row and column of the centre, then the standard deviation along rows and columns, as
        fractions of the picture's sides: 0 is the upper or left edge, 1 the lower or right one. All
        four are 0 for a map of zeros.
    """
    centres, spreads = [], []
    for axis, other in ((-2, -1), (-1, -2)):
        along = shares.sum(dim=other)
        count = shares.shape[axis]
        middles = (torch.arange(count, dtype=shares.dtype, device=shares.device) + 0.5) / count
        centre = (along * middles).sum(dim=-1)
        centres.append(centre)
        variance = (along * (middles - centre[..., None]).square()).sum(dim=-1)
        spreads.append(variance.clamp_min(_LEAST).sqrt() * (along.sum(dim=-1) > 0))
    return torch.stack([*centres, *spreads], dim=-1)


def most_telling(
    shares: Float[Tensor, "b words h w"], present: Bool[Tensor, "b words"], count: int
) -> Bool[Tensor, "b words"]:
    """The words whose maps say most of where, without saying the same.

    The sharpest comes first; of the others each counts by its sharpness times one minus its largest
    overlap with those chosen before, which is the sum of sqrt(a b) over cells.

    Args:
        shares: Maps of words.
        present: Mask of the words that there are.
        count: Number of words to keep per row; rows with fewer keep them all.
    """
    roots = shares.detach().sqrt().flatten(2)
    overlaps = (roots @ roots.mT).clamp(max=1)
    worth = sharpness(shares.detach())
    kept, taken = torch.zeros_like(present), torch.zeros_like(worth)
    for _ in range(min(count, present.shape[1])):
        left = (worth * (1 - taken)).masked_fill(kept | ~present, -1)
        best = left.argmax(dim=1, keepdim=True)
        kept = kept.scatter(1, best, True)
        taken = torch.maximum(taken, overlaps.take_along_dim(best[:, :, None], dim=1)[:, 0])
    return kept & present


def join_words(
    shares: Float[Tensor, "*b words h w"], present: Bool[Tensor, "*b words"]
) -> Float[Tensor, "*b h w"]:
    """One map for a whole text: the mean of its words' maps, weighted by their sharpness."""
    weights = sharpness(shares).clamp_min(_LEAST) * present
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(_LEAST)
    return einsum(weights, shares, "... words, ... words h w -> ... h w")


def change_map(
    uncond: Mapping[str, Float[Tensor, "b _c _h _w"]],
    cond: Mapping[str, Float[Tensor, "b _c _h _w"]],
) -> Float[Tensor, "b h w"]:
    """How far a text moves the features of each cell: |f_c - f_u|, mean over taps.

    At each tap lengths are shares of the mean length of f_u, on the finest grid of the taps.

    Args:
        uncond: Unconditional features f_u, by tap.
        cond: Conditional features f_c, by tap.
    """
    ratios = []
    for tap, without in uncond.items():
        change = (cond[tap].float() - without.float()).norm(dim=1, keepdim=True)
        usual = without.float().norm(dim=1, keepdim=True).mean(dim=(-2, -1), keepdim=True)
        ratios.append(change / usual.clamp_min(_LEAST))
    finest = max(((r.shape[-2], r.shape[-1]) for r in ratios), key=lambda grid: grid[0] * grid[1])
    return torch.cat([to_grid(ratio, finest) for ratio in ratios], dim=1).mean(dim=1)
