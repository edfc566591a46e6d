"""The projector that fits an encoder."""

from typing import Any, Protocol, runtime_checkable

from diffenc.checks.arguments import shown
from diffenc.errors import ConfigError
from diffenc.projector.fused import FusedProjector
from diffenc.projector.plain import Projector


@runtime_checkable
class TokenEncoder(Protocol):
    """What a projector is sized by: `DiffusionEncoder` and `FusedEncoder` are such."""

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""

    @property
    def token_channels(self) -> tuple[int, ...]:
        """Channels of a token that come from each tap and half, in order."""


def projector_for(
    encoder: TokenEncoder, out_features: int, kind: str = "mlp2x_gelu", *, norm: bool | None = None
) -> Projector | FusedProjector:
    """The projector that fits an encoder.

    Args:
        encoder: A `DiffusionEncoder` or `FusedEncoder`.
        out_features: Width of the language model.
        kind: Kind of the layers, see `Projector`.
        norm: Whether a layer norm for each tap (and half, and CLIP) stands before the first layer.
            None adds one where there are several, which costs little where scales are alike and
            saves much where they are not (`diffenc study parts`). False is LLaVA's way, and that of
            its `mm_projector.bin`.

    Raises:
        ConfigError: See `Projector`.
    """
    if not isinstance(encoder, TokenEncoder):
        raise ConfigError(
            f"a projector is made for a DiffusionEncoder or FusedEncoder, got {shown(encoder)}"
        )
    how: Any = getattr(encoder, "how", "channel")
    if norm is None:
        norm = len(encoder.token_channels) > 1
    groups = encoder.token_channels if norm else ()
    if how not in ("tokens", "interleave"):  # one kind of token
        return Projector(encoder.hidden_size, out_features, kind, norm_channels=groups)
    fused: Any = encoder
    return FusedProjector(
        fused.stream_channels,
        out_features,
        kind,
        how=how,
        first_tokens=fused.clip_tokens if how == "tokens" else None,
        norm_channels=(groups[:1], groups[1:]),
    )
