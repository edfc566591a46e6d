"""What a run is to learn of where words are."""

import math
from dataclasses import dataclass

from diffenc.checks.fields import conform
from diffenc.errors import ConfigError
from diffenc.grounding.loss import TIMESTEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundConfig:
    """Phrases with boxes or masks, and the loss on attention to their words.

    Attributes:
        annotations: File or folder of phrases, in any layout of
            `diffenc.grounding.read_phrases`.
        images: Folder to which the picture names in `annotations` are relative.
        split: Split of RefCOCO's expressions; other layouts have a file for each.
        limit: Number of records that are looked at, from the first on; None is all.
        weight: Weight of the loss on attention, beside the denoising loss or that of the answers,
            which have a weight of 1.
        denoising: Whether the denoiser also learns to predict the noise, which keeps the LoRA from
            unlearning pictures. None does so in the stage "ground".
        layers: Cross-attentions whose maps count, or modules around them, such as "up_blocks.1".
            None takes those that word tokens are gathered by, of the decoder, as far as the taps
            depend on it, and of these the ones whose maps have 8 x 8 cells or more.
        timesteps: First scheduler step that noise is drawn from, and the one behind the last.
        masks: Whether outlines are taken where the data have some; false takes boxes throughout.
    """

    annotations: str
    images: str
    split: str = "train"
    limit: int | None = None
    weight: float = 1.0
    denoising: bool | None = None
    layers: tuple[str, ...] | None = None
    timesteps: tuple[int, int] = TIMESTEPS
    masks: bool = True

    def __post_init__(self) -> None:
        conform(self, "ground.")
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"ground.weight must be above 0, got {self.weight}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"ground.limit must be 1 or more, got {self.limit}")
        first, behind = self.timesteps
        if not 0 <= first < behind <= 1000:
            raise ConfigError(
                "ground.timesteps must be two steps of [0, 1000], the first below the second, got "
                f"{list(self.timesteps)}"
            )
        if self.layers is not None and not self.layers:
            raise ConfigError("ground.layers must name one cross-attention or more, got none")
