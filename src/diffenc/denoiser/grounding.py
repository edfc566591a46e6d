"""How far the attention of words lies outside what they name: a pure function on maps."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_LEAST = 1e-9


def share_outside(
    maps: Mapping[str, Float[Tensor, "b tokens _h _w"]],
    masks: Float[Tensor, "b tokens h w"],
    weights: Float[Tensor, "b tokens"],
) -> Float[Tensor, ""]:
    """Mean squared share of the tokens' attention that lies outside what they name.

    0 where each token is seen nowhere but there, 1 where it is seen everywhere else. Layers count
    alike.

    Args:
        maps: Attention probabilities of the tokens at each cross-attention.
        masks: Share of each cell that is covered by what a token names, from 0 to 1, on any grid
            that is as fine as the finest map.
        weights: How much each token counts, 0 or more; 0 is a token that names nothing.

    Source:
        Wang et al. 2024 (TokenCompose), arXiv:2312.03626, the token-level loss. There masks are
        binary and shares are means over heads of each head's own; here cells are covered in part,
        and the map is the mean over heads, as word tokens gather by it.
    """
    total = weights.new_zeros((), dtype=torch.float32)
    with torch.autocast(weights.device.type, enabled=False):
        for attention in maps.values():
            cells = F.adaptive_avg_pool2d(masks, (attention.shape[-2], attention.shape[-1]))
            attended = attention.sum(dim=(2, 3)).clamp(min=_LEAST)
            inside = (attention * cells).sum(dim=(2, 3)) / attended
            astray = ((1 - inside).square() * weights).sum()
            total = total + astray / weights.sum().clamp(min=_LEAST)
    return total / len(maps)
