"""Pure functions on grids of features: resize, and to tokens."""

from collections.abc import Mapping

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def to_grid(
    features: Float[Tensor, "b c h w"], grid: tuple[int, int]
) -> Float[Tensor, "b c gh gw"]:
    """Resample a feature map: means over cells where the grid is coarser, bilinear where finer.

    The two axes are treated separately, so a map may grow in one and shrink in the other.
    """
    if features.shape[-2:] == grid:
        return features
    height, width = features.shape[-2:]
    coarse = (min(height, grid[0]), min(width, grid[1]))
    if coarse != (height, width):
        features = F.adaptive_avg_pool2d(features, coarse)
    if coarse != grid:
        features = F.interpolate(features, size=grid, mode="bilinear", align_corners=False)
    return features


def to_tokens(
    maps: Mapping[str, Float[Tensor, "b *t _c _h _w"]], grid: tuple[int, int]
) -> Float[Tensor, "b *t n c"]:
    """Bring every map to one grid, concatenate channels in order, and flatten row by row."""
    leading = next(iter(maps.values())).shape[:-3]
    rows = [features.flatten(0, -4) for features in maps.values()]
    joined = torch.cat([to_grid(features, grid) for features in rows], dim=1)
    tokens: Tensor = rearrange(joined, "b c h w -> b (h w) c")
    return tokens.reshape(*leading, *tokens.shape[1:])


def middle_grid(grids: list[tuple[int, int]]) -> tuple[int, int]:
    """The middle one of several grids by their number of cells; of two, the finer."""
    ordered = sorted(grids, key=lambda grid: grid[0] * grid[1])
    return ordered[len(ordered) // 2]
