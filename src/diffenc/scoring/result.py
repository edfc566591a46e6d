"""What a scorer returns: scores over several noises, their mean and deviation."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.scoring.config import ScorerConfig


@dataclass(frozen=True)
class Scores:
    """Scores of images under texts, higher is better, in float32 on the CPU.

    Attributes:
        trials: Scores for each noise seed (trials images texts).
        by_timestep: Scores before the mean over timesteps (trials images texts timesteps); NaN
            where a candidate was dropped before.
        seeds: Seeds of the noise, one per trial.
        texts: Texts that were scored.
        truncated: Number of tokens of each text that the text encoder did not read.
        dropped: Mask of the candidates that `screen` left out in the first trial (images texts);
            their score is -inf.
        config: Config of the scorer.
    """

    trials: Float[Tensor, "trials images texts"]
    by_timestep: Float[Tensor, "trials images texts timesteps"]
    seeds: tuple[int, ...]
    texts: tuple[str, ...]
    truncated: tuple[int, ...]
    dropped: Bool[Tensor, "images texts"]
    config: ScorerConfig = field(repr=False)

    @property
    def mean(self) -> Float[Tensor, "images texts"]:
        """Over trials."""
        return self.trials.mean(dim=0)

    @property
    def std(self) -> Float[Tensor, "images texts"]:
        """Sample standard deviation over trials (ddof 1); NaN for one trial, and where dropped."""
        if len(self.trials) == 1:
            return torch.full_like(self.trials[0], torch.nan)
        return self.trials.std(dim=0, correction=1)

    def best_texts(self) -> list[str]:
        """Text with the highest mean for each image; of equal ones the first."""
        return [self.texts[index] for index in self.mean.argmax(dim=1).tolist()]

    def best_images(self) -> list[int | None]:
        """Index of the image with the highest mean for each text; of equal ones the first.

        None for a text that `screen` left out for every image.

        Scores that are errors ("diffusion-classifier") do not compare over images, some of which
        are easier than others whatever the text.
        """
        best: list[int] = self.mean.argmax(dim=0).tolist()
        gone: list[bool] = self.dropped.all(dim=0).tolist()
        return [None if out else image for image, out in zip(best, gone, strict=True)]


def stack_trials(trials: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Scores and scores by timestep of several trials."""
    scores, by_timestep = zip(*trials, strict=True)
    return torch.stack(scores), torch.stack(by_timestep)
