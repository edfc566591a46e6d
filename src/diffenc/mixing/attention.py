"""One stream's tokens ask the other's: blocks of cross-attention."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from diffenc.errors import ConfigError
from diffenc.mixing.base import GroupNorms, Mixer

_WIDENED = 4


class CrossAttention(Mixer):
    """Pre-norm transformer blocks in which one stream's tokens attend to all of the other's.

    The result has the asking stream's tokens and width. What a block adds is zero at first, so
    that training begins from the asking stream alone; without a residual, from what is attended to.

    Source:
        arXiv:2507.07106, table 2, which names cross-attention and states neither who asks nor the
        number of blocks and heads, nor whether there is a residual.
    """

    how = "cross_attention"

    def __init__(self, *streams: Any, **options: Any) -> None:
        super().__init__(*streams, **options)
        config = self.config
        pair = (self.clip_channels, self.diffusion_channels)
        self.channels, others = pair if config.asks == "clip" else pair[::-1]
        if self.width % config.heads:
            some = [str(n) for n in range(1, 33) if self.width % n == 0]
            raise ConfigError(
                f"mixing.heads must divide the {self.width} channels of the stream that asks "
                f"({config.asks}), got {config.heads}; {', '.join(some)} do"
            )
        self.others_norm = GroupNorms(others)
        self.blocks = nn.ModuleList(
            _Block(self.channels, sum(others), config.heads, residual=config.residual)
            for _ in range(config.blocks)
        )

    def _begin(self) -> None:
        for block in self._in_order():
            block.begin()

    def _in_order(self) -> "Iterator[_Block]":
        for block in self.blocks:
            assert isinstance(block, _Block)
            yield block

    def _mix(
        self, clip: Tensor, diffusion: Tensor, text: Tensor | None, there: Tensor | None
    ) -> Tensor:
        pair = (clip, diffusion)
        clip_asks = self.config.asks == "clip"
        tokens, others = pair if clip_asks else pair[::-1]
        others = self.others_norm(others)
        mask = there[:, None, None] if there is not None and clip_asks else None
        for block in self._in_order():
            tokens = block(tokens, others, mask)
        return tokens if there is None or clip_asks else tokens * there[..., None]


class _Block(nn.Module):
    """Attention and a layer of two linear maps, each behind a norm."""

    def __init__(self, groups: Sequence[int], others: int, heads: int, *, residual: bool) -> None:
        super().__init__()
        width = sum(groups)
        self.heads, self.residual = heads, residual
        place: dict[str, Any] = {"dtype": torch.float32, "device": "meta"}
        self.norm, self.mlp_norm = GroupNorms(groups), GroupNorms(groups)
        self.query = nn.Linear(width, width, **place)
        self.key, self.value = (nn.Linear(others, width, **place) for _ in range(2))
        self.out = nn.Linear(width, width, **place)
        self.mlp = nn.Sequential(
            nn.Linear(width, _WIDENED * width, **place),
            nn.GELU(),
            nn.Linear(_WIDENED * width, width, **place),
        )

    def begin(self) -> None:
        """Add nothing at first."""
        nn.init.zeros_(self.mlp[-1].weight)  # type: ignore[arg-type]
        if self.residual:  # without one, nothing would be left
            self.out.weight.zero_()

    def forward(self, tokens: Tensor, others: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens that have attended to the others, those alone that the mask has."""
        parts = (self.query(self.norm(tokens)), self.key(others), self.value(others))
        query, key, value = (
            rearrange(part, "b n (heads c) -> b heads n c", heads=self.heads) for part in parts
        )
        values = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = self.out(rearrange(values, "b heads n c -> b n (heads c)"))
        tokens = tokens + attended if self.residual else attended
        mixed: Tensor = tokens + self.mlp(self.mlp_norm(tokens))
        return mixed
