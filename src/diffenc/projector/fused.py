"""A projector for each of two streams of tokens."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffenc.checks.arguments import shown, whole
from diffenc.config import check_choice
from diffenc.errors import ConfigError, ShapeError
from diffenc.projector.plain import Projector, check_tokens
from diffenc.projector.saved import SavedProjector


class FusedProjector(SavedProjector):
    """One projector per stream, for tokens that belong either to CLIP or to the U-Net.

    `FusedEncoder` gives such tokens for "tokens" and "interleave"; their channels are those of both
    streams, and zero in the other's.

    Args:
        in_features: Number of channels of the first stream and of the second:
            `encoder.stream_channels`.
        out_features: Width of the language model.
        kind: Kind of both projectors, see `Projector`.
        how: Order of the tokens: "tokens" where the first stream's come first, "interleave" where
            the two take turns.
        first_tokens: Number of tokens of the first stream, which "tokens" needs; not read
            otherwise.
        norm_channels: Norm groups of each of the two projectors, see `Projector`.

    Raises:
        ConfigError: As `Projector`; an unknown `how`, or "tokens" without their number.

    Examples:
        >>> projector = FusedProjector((1024, 1280), 4096, how="tokens", first_tokens=576)
        >>> projector(torch.zeros(1, 576 + 256, 1024 + 1280)).shape
        torch.Size([1, 832, 4096])

    Source:
        Tong et al. 2024, "Eyes Wide Shut?", arXiv:2401.06209: an adapter for each encoder.
    """

    options = ("in_features", "out_features", "kind", "how", "first_tokens", "norm_channels")

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        kind: str = "mlp2x_gelu",
        *,
        how: Literal["tokens", "interleave"],
        first_tokens: int | None = None,
        norm_channels: Sequence[Sequence[int]] = ((), ()),
    ) -> None:
        super().__init__()
        check_choice("how", how, ("tokens", "interleave"))
        pairs = [isinstance(each, (tuple, list)) for each in (in_features, norm_channels)]
        if not all(pairs) or len(in_features) != 2 or len(norm_channels) != 2:
            raise ConfigError(
                f"a fused projector takes the widths of two streams, got {shown(in_features)} with "
                f"norm_channels={shown(norm_channels)}"
            )
        if how == "tokens":
            what = "first_tokens, which how='tokens' needs: the number of the first stream's,"
            first_tokens = whole(what, first_tokens, least=1)
        self.in_features, self.out_features = tuple(in_features), out_features
        self.kind, self.how, self.first_tokens = kind, how, first_tokens
        self.streams = nn.ModuleList(
            Projector(width, out_features, kind, norm_channels=groups)
            for width, groups in zip(self.in_features, norm_channels, strict=True)
        )
        self.norm_channels = tuple(stream.norm_channels for stream in self.streams)

    def forward(self, tokens: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b n d"]:
        """Project each token by its stream's projector; their order stays.

        Raises:
            ShapeError: Another number of channels, or a number of tokens that is no such mixture.
        """
        left, right = self.in_features
        check_tokens(tokens)
        if tokens.shape[-1] != left + right:
            raise ShapeError(
                f"this projector takes tokens of {left} + {right} channels, got "
                f"{tokens.shape[-1]} (shape {tuple(tokens.shape)})"
            )
        count = tokens.shape[-2]
        if self.how == "interleave":
            if count % 2:
                raise ShapeError(f"interleaved tokens come in pairs, got {count}")
            pairs = [
                self.streams[0](tokens[..., 0::2, :left]),
                self.streams[1](tokens[..., 1::2, left:]),
            ]
            return torch.stack(pairs, dim=-2).flatten(-3, -2)
        assert self.first_tokens is not None
        if count <= self.first_tokens:
            raise ShapeError(
                f"of {count} tokens {self.first_tokens} would be the first stream's, which leaves "
                "none for the second"
            )
        first = self.streams[0](tokens[..., : self.first_tokens, :left])
        second = self.streams[1](tokens[..., self.first_tokens :, left:])
        return torch.cat([first, second], dim=-2)
