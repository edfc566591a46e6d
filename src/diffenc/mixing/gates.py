"""Sums of two streams on one grid: plain, weighted, and gated."""

from typing import Any

import torch
from torch import Tensor, nn

from diffenc.errors import ShapeError
from diffenc.mixing.base import GroupNorms, Mixer


class _Sum(Mixer):
    """Base of the sums, each stream normed and brought to CLIP's width by a linear layer."""

    def __init__(self, *streams: Any, **options: Any) -> None:
        super().__init__(*streams, **options)
        width = sum(self.clip_channels)
        self.channels = (width,)
        self.diffusion_norm = GroupNorms(self.diffusion_channels)
        self.diffusion_in = _linear(sum(self.diffusion_channels), width)

    def _check(self, clip: Tensor, diffusion: Tensor, text: Tensor | None) -> None:
        super()._check(clip, diffusion, text)
        if clip.shape[:-1] != diffusion.shape[:-1]:
            raise ShapeError(
                f"how={self.how!r} adds cell to cell, got tokens {tuple(clip.shape)} and "
                f"{tuple(diffusion.shape)}; both streams need one grid, and one timestep"
            )


class _BothAligned(_Sum):
    """Base of the sums into which CLIP's tokens, too, go through a norm and a linear layer."""

    def __init__(self, *streams: Any, **options: Any) -> None:
        super().__init__(*streams, **options)
        self.clip_norm = GroupNorms(self.clip_channels)
        self.clip_in = _linear(self.channels[0], self.channels[0])

    def _aligned(self, clip: Tensor, diffusion: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self.clip_in(self.clip_norm(clip)),
            self.diffusion_in(self.diffusion_norm(diffusion)),
        )


class Add(_BothAligned):
    """The sum."""

    how = "add"

    def _mix(
        self, clip: Tensor, diffusion: Tensor, text: Tensor | None, there: Tensor | None
    ) -> Tensor:
        left, right = self._aligned(clip, diffusion)
        return left + right


class Weighted(_BothAligned):
    """w of CLIP and 1 - w of the diffusion encoder; w is one number, the sigmoid of a weight."""

    how = "weighted"

    def __init__(self, *streams: Any, **options: Any) -> None:
        super().__init__(*streams, **options)
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float32, device="meta"))

    def _begin(self) -> None:
        self.weight.zero_()

    def _mix(
        self, clip: Tensor, diffusion: Tensor, text: Tensor | None, there: Tensor | None
    ) -> Tensor:
        left, right = self._aligned(clip, diffusion)
        share = self.weight.sigmoid()
        return share * left + (1 - share) * right


class Gated(_Sum):
    """CLIP's tokens as they are, and the other stream through a gate per channel: tanh of a weight.

    The gate is zero at first: training begins from CLIP alone, and its first step moves the gate.
    """

    how = "gated"

    def __init__(self, *streams: Any, **options: Any) -> None:
        super().__init__(*streams, **options)
        zeros = torch.zeros(self.channels[0], dtype=torch.float32, device="meta")
        self.gate = nn.Parameter(zeros)

    def _begin(self) -> None:
        self.gate.zero_()

    def _mix(
        self, clip: Tensor, diffusion: Tensor, text: Tensor | None, there: Tensor | None
    ) -> Tensor:
        right: Tensor = self.diffusion_in(self.diffusion_norm(diffusion))
        return clip + self.gate.tanh() * right


class _GateOfBoth(_BothAligned):
    """Base of the gates that read both streams."""

    def __init__(self, *streams: Any, **options: Any) -> None:
        super().__init__(*streams, **options)
        self.gate = _linear(2 * self.channels[0], self.channels[0])

    def _begin(self) -> None:
        self.gate.weight.zero_()

    def _mix(
        self, clip: Tensor, diffusion: Tensor, text: Tensor | None, there: Tensor | None
    ) -> Tensor:
        left, right = self._aligned(clip, diffusion)
        share = self._logits(left, right, text).sigmoid()
        return share * left + (1 - share) * right

    def _logits(self, left: Tensor, right: Tensor, text: Tensor | None) -> Tensor:
        logits: Tensor = self.gate(torch.cat([left, right], dim=-1))
        return logits


class TokenGated(_GateOfBoth):
    """g of CLIP and 1 - g of the other; g per token and channel is read from both.

    It begins at 1/2 everywhere. VEGA-3D's gate of this name is one number per token.
    """

    how = "token_gated"


class QuestionGated(_GateOfBoth):
    """Gate as in `TokenGated` that also reads the text's state."""

    how = "question_gated"

    def __init__(self, *streams: Any, **options: Any) -> None:
        super().__init__(*streams, **options)
        assert self.text_width is not None
        self.text_norm = GroupNorms((self.text_width,))
        self.text_gate = _linear(self.text_width, self.channels[0])

    def _begin(self) -> None:
        super()._begin()
        self.text_gate.weight.zero_()

    def _logits(self, left: Tensor, right: Tensor, text: Tensor | None) -> Tensor:
        assert text is not None
        text_logits: Tensor = self.text_gate(self.text_norm(text[:, None]))
        return super()._logits(left, right, text) + text_logits


def _linear(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, dtype=torch.float32, device="meta")
