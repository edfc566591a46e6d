"""Register cells: single cells of a feature map that dwarf all others, and what replaces them."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from diffenc.checks.arguments import number
from diffenc.errors import ConfigError, ShapeError

REGISTER_RATIO = 3.0
"""How far above the median a register's norm lies, at the least."""


def register_cells(
    features: Float[Tensor, "*b c h w"], *, ratio: float = REGISTER_RATIO
) -> Bool[Tensor, "*b h w"]:
    """Find the cells that act as registers: large where nothing around them is.

    A cell is one if the length of its feature vector is more than `ratio` times the median length
    in its picture, which does not move with the cells that are looked for, and more than `ratio`
    times the length of all the cells around it (eight, or fewer at an edge) but one. The second
    condition spares what the picture itself makes long: an object covers cells side by side.

    Args:
        features: Feature maps in any floating point type.
        ratio: Factor above 1. Lower ones find more cells.

    Returns:
        True for registers; a cell with fewer than two cells around is none.

    Raises:
        ConfigError: A ratio of 1 or less, or none.
        ShapeError: Not feature maps.

    Source:
        Darcet et al. 2024 (Vision Transformers Need Registers), arXiv:2309.16588, section 2: tokens
        of large norm, cut off at 150 for DINOv2, about three times the usual norm. The cutoff here
        is relative, since norms differ between taps by orders of magnitude, and the condition on
        the surroundings is ours.
    """
    if number("ratio", ratio) <= 1:
        raise ConfigError(f"ratio must be above 1, got {ratio}: a register exceeds the median")
    if features.ndim < 3:
        raise ShapeError(f"registers are cells of maps (b c h w), got {tuple(features.shape)}")
    norms = features.detach().float().norm(dim=-3)
    flat = norms.flatten(end_dim=-3) if norms.ndim > 2 else norms[None]
    typical = flat.flatten(1).median(dim=1).values[:, None, None]
    registers: Tensor = (flat > ratio * typical) & (flat > ratio * _around(flat))
    return registers.reshape(norms.shape)


def _around(norms: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """The second largest of the eight values around each; infinity where there is no second."""
    padded = F.pad(norms, (1, 1, 1, 1), value=-1.0)
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).flatten(-2)
    others = torch.cat([windows[..., :4], windows[..., 5:]], dim=-1)
    second = others.topk(2, dim=-1).values[..., 1]
    return second.masked_fill(second < 0, float("inf"))


def without_cells(
    features: Float[Tensor, "*b c h w"], cells: Bool[Tensor, "*b h w"]
) -> Float[Tensor, "*b c h w"]:
    """Feature maps in which some cells are replaced by the mean of the others around them.

    What is left out has no part in any mean that follows. Cells with no other beside them are
    filled in later turns, from the edge of the hole to its middle.

    Args:
        features: Feature maps.
        cells: Cells to replace, not all of a map.

    Raises:
        ShapeError: Nothing is left of a map.
    """
    if not bool(cells.any()):
        return features
    if bool(cells.flatten(-2).all(dim=-1).any()):
        raise ShapeError("every cell of a map is to be left out, and nothing could replace them")
    maps = features.reshape(-1, *features.shape[-3:])
    holes = rearrange(cells.reshape(-1, *cells.shape[-2:]), "b h w -> b 1 h w")
    values = maps.float().masked_fill(holes, 0)
    while bool(holes.any()):
        # Means of a window with holes as zeros; their ratio is the mean over what is no hole.
        known = F.avg_pool2d((~holes).float(), 3, stride=1, padding=1)
        means = F.avg_pool2d(values, 3, stride=1, padding=1) / known.clamp_min(1e-6)
        fills = holes & (known > 0)
        values = torch.where(fills, means, values)
        holes = holes & ~fills
    holes = rearrange(cells.reshape(-1, *cells.shape[-2:]), "b h w -> b 1 h w")
    return torch.where(holes, values.to(features.dtype), maps).reshape(features.shape)
