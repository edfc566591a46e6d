"""Features behind a block's adaptive norm, some channels of whose input were discarded.

A few channels of diffusion transformers are larger than all others by orders of magnitude, at every
cell alike. DiTF (Gan et al. 2025, arXiv:2505.18584) zeroes them before the norm, which would spread
them over the other channels, and norms what it has averaged over draws of noise.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffenc.checks.arguments import number
from diffenc.denoiser.transformers import TransformerLayout
from diffenc.errors import ConfigError, ShapeError

MASSIVE_RATIO = 100.0
"""How far above the median channel's a massive channel's magnitude lies, at the least."""


def massive_channels(
    features: Float[Tensor, "*b c h w"], *, ratio: float = MASSIVE_RATIO
) -> tuple[int, ...]:
    """Channels whose mean magnitude dwarfs that of the median channel.

    Args:
        features: Feature maps, such as those of the block before an adaptive norm.
        ratio: Factor above 1. Lower ones find more channels.

    Raises:
        ConfigError: A ratio of 1 or less, or none.
        ShapeError: Not feature maps.

    Source:
        Sun et al. 2024 (Massive Activations), arXiv:2402.17762, section 2, which calls an
        activation massive above 100 and about 1000 times the median magnitude; the ratio of means
        over cells is ours, since DiTF's release names its two channels without a rule.
    """
    if number("ratio", ratio) <= 1:
        raise ConfigError(f"ratio must be above 1, got {ratio}: a massive channel exceeds others")
    if features.ndim < 3:
        raise ShapeError(f"channels are those of maps (b c h w), got {tuple(features.shape)}")
    magnitudes = rearrange(features.detach().float().abs(), "... c h w -> c (... h w)").mean(dim=1)
    massive = magnitudes > ratio * magnitudes.median()
    return tuple(massive.nonzero()[:, 0].tolist())


def is_adaptive_norm(path: str) -> bool:
    """Whether a tap is the adaptive norm of a block's input."""
    return path.endswith(".norm")


def pack_input(
    layout: TransformerLayout,
    path: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    grid: tuple[int, int],
) -> Float[Tensor, "b c h w"]:
    """The picture's part of what a norm is given and, behind it in channels, what modulates it.

    Args:
        layout: Layout of the transformer.
        path: Module path of the norm.
        args: Positional arguments of the norm: the tokens of both streams.
        kwargs: Keyword arguments of the norm: `emb` is what its modulation is made of.
        grid: Rows and columns of the picture's tokens.
    """
    maps = layout.image_map(path, args[0], grid)
    return torch.cat([maps, kwargs["emb"][:, :, None, None].expand_as(maps)], dim=1)


def normed(
    norm: nn.Module, packed: Float[Tensor, "*b c h w"], discard: Sequence[int]
) -> Float[Tensor, "*b _c h w"]:
    """Maps behind a norm, from what `pack_input` gave.

    Args:
        norm: Adaptive norm of a block's input.
        packed: Inputs and modulations, or their means over draws.
        discard: Channels of the input that are zeroed first.
    """
    flat = packed.flatten(end_dim=-4)
    maps, modulation = flat.chunk(2, dim=1)
    channels = torch.tensor(list(discard), dtype=torch.long, device=maps.device)
    tokens = rearrange(maps.index_fill(1, channels, 0.0), "b c h w -> b (h w) c")
    output = norm(tokens, emb=modulation[:, :, 0, 0])[0]
    h, w = maps.shape[2:]
    apart: Tensor = rearrange(output, "b (h w) c -> b c h w", h=h, w=w)
    return apart.reshape(*packed.shape[:-3], -1, h, w)
