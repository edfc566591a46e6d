"""One scoring call: images and texts, encoded once, scored under one noise after the other."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.checks.arguments import entries
from diffenc.denoiser.attention_scores import layer_mix
from diffenc.errors import PromptError
from diffenc.inputs.images import Images, to_pixel_values
from diffenc.inputs.prompts import match_batch
from diffenc.scoring.base import ConfiguredScorer
from diffenc.scoring.calibration import reference_pixels
from diffenc.scoring.encoded_call import encode_call, warn_cut
from diffenc.scoring.pairs import pair_scores
from diffenc.scoring.screening import Candidates, successive_halving

Step = tuple[int, int]
Trial = tuple[Float[Tensor, "images texts"], Float[Tensor, "images texts timesteps"]]
"""Scores under one draw of noise: their mean over timesteps, and those of each timestep."""


class ScoreCall:
    """Images and texts of one call.

    Args:
        scorer: Scorer whose model, config, references and memories are used.
        images: Pictures of any kind.
        texts: One text or several.

    Attributes:
        texts: List of all texts.
        images: Number of images.
        truncated: Number of tokens of each text that the text encoder does not read.

    Raises:
        ImageError: A picture cannot be read.
        ShapeError: Sizes that the model does not take.
        PromptError: No text, or something that is none.
    """

    def __init__(
        self, scorer: ConfiguredScorer, images: Images, texts: str | Sequence[str]
    ) -> None:
        config = scorer.config
        self.texts = _listed(texts)
        pixel_values = picture_values(scorer, images)
        size = (pixel_values.shape[2], pixel_values.shape[3])
        references = reference_pixels(config, size, scorer.references).to(pixel_values)
        self.images = len(pixel_values)
        self._scorer, self._config = scorer, config
        # Images, then references; texts, then reference texts.
        self._encoded = encode_call(
            scorer.backbone,
            torch.cat([pixel_values, references]),
            [*self.texts, *config.reference_texts],
            config,
            seed=config.seed,
            use_cache=scorer.use_cache,
        )
        warn_cut(self._encoded)
        self.truncated = self._encoded.truncated[: len(self.texts)]

    def every_pair(self) -> Bool[Tensor, "images texts"]:
        """All images with all texts."""
        return torch.ones(self.images, len(self.texts), dtype=torch.bool, device="cpu")

    def trial(self, pairs: Bool[Tensor, "images texts"], seed: int) -> Trial:
        """Score pairs; NaN elsewhere."""
        steps = self._pairs(pairs, self._config.steps, self._mix(), seed)[..., 0]
        by_timestep = self._by_timestep(steps)
        return by_timestep.mean(dim=2), by_timestep

    def screened(
        self, seed: int, keep: int, over: Candidates
    ) -> tuple[Trial, Bool[Tensor, "images texts"]]:
        """Score all pairs, dropping candidates on the way: scores, and what was dropped."""
        mix = self._mix()
        steps, dropped = successive_halving(
            lambda alive, step: self._pairs(alive, [step], mix, seed)[:, :, 0, 0],
            (self.images, len(self.texts)),
            self._config.steps,
            keep=keep,
            candidates=over,
        )
        by_timestep = self._by_timestep(steps)
        return (by_timestep.mean(dim=2).masked_fill(dropped, -torch.inf), by_timestep), dropped

    def by_layer(self, layers: int, seed: int) -> Float[Tensor, "layers images texts"]:
        """Scores of all pairs by each layer alone."""
        each = torch.eye(layers, dtype=torch.float32, device="cpu")
        steps = self._pairs(self.every_pair(), self._config.steps, each, seed)
        return steps.mean(dim=2).permute(2, 0, 1)

    def _pairs(
        self, pairs: Tensor, steps: Sequence[Step], mix: Tensor, seed: int
    ) -> Float[Tensor, "images texts steps out"]:
        scorer, encoded = self._scorer, replace(self._encoded, seed=seed)
        return pair_scores(encoded, pairs, steps, mix, rows=scorer.rows, queries=scorer.queries)

    def _by_timestep(self, steps: Tensor) -> Float[Tensor, "images texts timesteps"]:
        shape = (len(self._config.timesteps), self._config.draws)
        means: Tensor = steps.unflatten(2, shape).mean(dim=3)
        return means

    def _mix(self) -> Float[Tensor, "layers 1"]:
        if not self._config.attention:
            return torch.zeros(0, 1, dtype=torch.float32, device="cpu")
        return layer_mix(self._config.layer_weights, len(self._scorer.layers))


def picture_values(scorer: ConfiguredScorer, images: Images) -> Float[Tensor, "b 3 height width"]:
    """Pictures in the size that the scorer scores them in."""
    config, backbone = scorer.config, scorer.backbone
    return to_pixel_values(
        images,
        size=config.size or backbone.default_size,
        resize=config.resize,
        multiple=backbone.multiple,
    )


def _listed(texts: str | Sequence[str]) -> list[str]:
    several = isinstance(texts, Iterable) and not isinstance(texts, (str, Mapping, Set))
    every = entries(texts) if several else texts
    listed = match_batch(every, len(every) if isinstance(every, list) else 1)
    if not listed:
        raise PromptError("got no texts; pass at least one")
    return listed
