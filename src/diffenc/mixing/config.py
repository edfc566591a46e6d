"""Options of the ways of mixing."""

from dataclasses import dataclass
from typing import get_args

from diffenc._typing import Mixed, Stream
from diffenc.checks.arguments import whole
from diffenc.checks.fields import conform
from diffenc.config import check_choice
from diffenc.errors import ConfigError

MIXED: tuple[str, ...] = get_args(Mixed)
"""Ways of fusing that have weights of their own."""
_MOST = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingConfig:
    """Options for mixing two streams. All but the seed are for "cross_attention".

    The paper (arXiv:2507.07106) names cross-attention, and states none of these. One block and
    eight heads are the defaults of VEGA-3D (arXiv:2603.19235), in which CLIP's stream asks.

    Attributes:
        asks: Stream whose tokens attend to the other's, "clip" or "diffusion"; the result has their
            number and their width. Not stated by the paper.
        blocks: Number of blocks that run one after another. Not stated by the paper.
        heads: Number of heads of the attention, which must divide the width of the stream that
            asks. Not stated by the paper.
        residual: Whether what was attended to is added to the asking tokens; otherwise it stands in
            their place. Not stated by the paper.
        seed: Seed of the initial weights.

    Raises:
        ConfigError: A value is not allowed.
    """

    asks: Stream = "clip"
    blocks: int = 1
    heads: int = 8
    residual: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        conform(self, "mixing.")
        check_choice("mixing.asks", self.asks, get_args(Stream))
        for name in ("blocks", "heads"):
            whole(f"mixing.{name}", getattr(self, name), least=1, most=_MOST)
        whole("mixing.seed", self.seed, least=0, most=2**32 - 1)

    def check_read(self, how: str) -> None:
        """Raise a `ConfigError` where an option is set that a way of fusing does not read."""
        if how == "cross_attention":
            return
        usual = MixingConfig()
        for name in ("asks", "blocks", "heads", "residual"):
            if getattr(self, name) != getattr(usual, name):
                raise ConfigError(
                    f"mixing.{name} is read by how='cross_attention' alone, and this is "
                    f"how={how!r}; leave it out"
                )
        if how not in MIXED and self != usual:
            raise ConfigError(
                f"mixing is read by {', '.join(MIXED)}, and this is how={how!r}, which has no "
                "weights; leave it out"
            )
