"""What an adapter is built by: its size, and which linear layers it changes."""

import math
from dataclasses import dataclass

from diffenc.checks.arguments import shown, whole
from diffenc.checks.fields import conform
from diffenc.errors import ConfigError

_LARGEST = 2**16

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""The linear layers of a cross-attention, all of which are adapted by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """Options that an adapter is built by.

    Attributes:
        rank: Rank of the update.
        alpha: Numerator of the scale alpha / rank of the update; None is the rank, a scale of 1.
        dropout: Probability with which inputs of the update are zeroed in training.
        projections: Names of the linear layers of each cross-attention that are adapted; see
            `PROJECTIONS`.

    Raises:
        ConfigError: A value is out of range or unknown.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    projections: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        conform(self)
        whole("rank", self.rank, least=1, most=_LARGEST)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha must be above 0, got {self.alpha!r}")
        unknown = [name for name in self.projections if name not in PROJECTIONS]
        if unknown or not self.projections:
            raise ConfigError(
                f"projections must be some of {list(PROJECTIONS)}, got {shown(self.projections)}"
            )
