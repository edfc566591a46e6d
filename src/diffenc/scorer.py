"""How well images and texts agree, and where in an image a word is seen."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc.errors import ConfigError, ShapeError
from diffenc.images import Images, ImageSource, as_list
from diffenc.memo import image_keys, posterior_of
from diffenc.scoring.base import ConfiguredScorer
from diffenc.scoring.calibration import reference_pixels
from diffenc.scoring.config import SCORE_TIMESTEPS, ScorerConfig
from diffenc.scoring.denoising import denoising_scores
from diffenc.scoring.layer_weights import fit_layer_weights
from diffenc.scoring.query_bank import SHARD_BYTES, QueryBank, bank_bytes, write_bank
from diffenc.scoring.result import Scores, stack_trials
from diffenc.scoring.screening import Candidates
from diffenc.scoring.trials import ScoreCall, Trial, picture_values
from diffenc.viz.heatmap import HeatMap
from diffenc.word_maps import heat_maps, to_picture, word_maps, words_of

__all__ = [
    "SCORE_TIMESTEPS",
    "CrossAttnScorer",
    "QueryBank",
    "ScorerConfig",
    "Scores",
    "denoising_scores",
    "word_maps",
]


class CrossAttnScorer(ConfiguredScorer):
    """Image-text scores from the cross-attention and the noise prediction of a text-to-image model.

    Nothing is generated: images are encoded by the VAE, noised, and passed through the U-Net under
    each text. Each image and each text is encoded once; all rows (images x texts x timesteps) share
    their noise and are batched. A score does not depend on what else is in the call.

    Attributes:
        backbone: The model, a registered submodule.
        config: What a score is.
        use_cache: Remember latents, prompts and rows of frozen models that were computed before.

    Example:
        >>> scorer = CrossAttnScorer.from_pretrained("shapes")
        >>> scorer([circle, square], ["a red circle", "a blue square"]).shape
        torch.Size([2, 2])

    Source:
        "Multimodal Understanding using Stable Diffusion as a Task Aware Feature Extractor",
        section 4; He et al. 2023 (Discffusion), arXiv:2305.10722.
    """

    def forward(
        self, images: Images, texts: str | Sequence[str], *, seed: int | None = None
    ) -> Float[Tensor, "images texts"]:
        """Score every image under every text.

        Args:
            images: One or several pictures of any kind, see `diffenc.images.to_pixel_values`.
            texts: One or several.
            seed: Of the noise; None takes the config's.

        Returns:
            Higher is better; float32, on the CPU wherever the model is.

        Raises:
            ImageError: A picture cannot be read.
            ShapeError: Sizes that the model does not take.
            PromptError: No text, or something that is none.
            NonFiniteError: NaN or infinity came out of the U-Net.
        """
        call = ScoreCall(self, images, texts)
        return call.trial(call.every_pair(), self._seed(seed))[0]

    def score_pairs(
        self, images: Images, texts: Sequence[str], *, seed: int | None = None
    ) -> Float[Tensor, " pairs"]:
        """Score image k under text k alone.

        Args:
            images: Pictures.
            texts: As many.
            seed: Of the noise; None takes the config's.

        Raises:
            ShapeError: Another number of texts than of images.
            ImageError: A picture cannot be read.
            PromptError: Something that is no text.
        """
        call = ScoreCall(self, images, texts)
        if call.images != len(call.texts):
            raise ShapeError(
                f"pairs need as many images as texts, got {call.images} and {len(call.texts)}; "
                "scorer(images, texts) scores all with all"
            )
        scores, _ = call.trial(torch.eye(call.images, dtype=torch.bool), self._seed(seed))
        return scores.diagonal().clone()

    def score(
        self,
        images: Images,
        texts: str | Sequence[str],
        *,
        trials: int = 1,
        seed: int | None = None,
        screen: int | None = None,
        screen_over: Candidates = "texts",
    ) -> Scores:
        """Score every image under every text, several times with other noise.

        Args:
            images: Pictures.
            texts: One or several.
            trials: How many; trial k takes the noise of seed + k.
            seed: Of the first trial; None takes the config's.
            screen: Drop candidates that fall behind, half of them after each step, and score this
                many to the end, exactly; None scores all.
            screen_over: Candidates are "texts" of an image, or "images" of a text.

        Raises:
            ConfigError: Fewer than one trial or candidate, or `screen` where it saves nothing.
            ImageError: A picture cannot be read.
            ShapeError: Sizes that the model does not take.
            PromptError: No text, or something that is none.
            NonFiniteError: NaN or infinity came out of the U-Net.
        """
        if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
            raise ConfigError(f"trials must be an int of 1 or more, got {trials!r}")
        if screen is not None and self.config.mode == "shared-query":
            raise ConfigError("screen saves nothing with mode 'shared-query': texts cost no passes")
        call = ScoreCall(self, images, texts)
        pairs = call.every_pair()
        seeds = tuple(self._seed(seed) + trial for trial in range(trials))
        dropped = torch.zeros_like(pairs)
        results: list[Trial] = []
        for trial_seed in seeds:
            if screen is None:
                results.append(call.trial(pairs, trial_seed))
                continue
            result, out = call.screened(trial_seed, screen, screen_over)
            results.append(result)
            dropped |= out
        scores, by_timestep = stack_trials(results)
        return Scores(
            trials=scores.masked_fill(dropped, -torch.inf),
            by_timestep=by_timestep,
            seeds=seeds,
            texts=tuple(call.texts),
            truncated=call.truncated,
            dropped=dropped,
            config=self.config,
        )

    def layer_scores(
        self, images: Images, texts: str | Sequence[str], *, seed: int | None = None
    ) -> Float[Tensor, "layers images texts"]:
        """The score that each layer alone would give, calibrated as the config says.

        Raises:
            ConfigError: A score with an error part, which belongs to no layer.
        """
        if self.config.error_term is not None:
            raise ConfigError("scores with an error term are not those of layers; set it to None")
        return ScoreCall(self, images, texts).by_layer(len(self.layers), self._seed(seed))

    def fit_layers(
        self, items: Iterable[tuple[Images, Sequence[str]]], *, seed: int | None = None
    ) -> tuple[float, ...]:
        """Choose layer weights on validation items, and take them into the config.

        Weights belong to the kind of items, the mode and the calibration that they were chosen
        with. Never choose them on the items that a result is reported for.

        Args:
            items: Each with some images and as many texts, image k fitting text k: two or more,
                equally many in all.
            seed: Of the noise; None takes the config's.

        Returns:
            The weights, of `layers`.

        Raises:
            ShapeError: No item, or items of another shape.
            ConfigError: A score with an error part, which belongs to no layer.
        """
        found = [self.layer_scores(images, texts, seed=seed) for images, texts in items]
        if len({scores.shape for scores in found}) != 1:
            shapes = sorted({tuple(scores.shape[1:]) for scores in found})
            raise ShapeError(f"items must be of one shape (images, texts), got {shapes}")
        weights = fit_layer_weights(torch.stack(found))
        self.config = replace(self.config, layer_weights=weights)
        return weights

    def word_maps(
        self,
        image: ImageSource,
        text: str,
        words: str | Sequence[str] | None = None,
        *,
        preset: Literal["daam"] | None = None,
        layers: str | Sequence[str] | None = None,
        heads: Sequence[int] | None = None,
        timesteps: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> dict[str, HeatMap]:
        """Where in an image each word of a text is seen.

        Args:
            image: A picture of any kind.
            text: The prompt.
            words: Words of it, or several in a row as one ("red circle"); None takes every word.
            preset: None is the share of a cell's attention that the word gets, mean over heads,
                layers and timesteps; "daam" is that program's definition.
            layers: Module paths of cross-attentions or of blocks around them; None takes all, for
                "daam" all but the middle block's.
            heads: Indices of the heads that count; None takes all.
            timesteps: Noise levels; None takes the config's.
            seed: Of the noise; None takes the config's.

        Returns:
            Per word a map that lies over the picture, with it for a notebook.

        Raises:
            ImageError: The picture cannot be read.
            ShapeError: More than one picture, or a size that the model does not take.
            PromptError: The text has no such word, or it was cut off.
            ConfigError: An unknown preset, or a timestep outside the schedule.
            TapError: No cross-attention by that name, or a layer without such a head.
        """
        config = self.config
        pixel_values = picture_values(self, image)
        if len(pixel_values) != 1:
            raise ShapeError(f"word maps are of one image, got {len(pixel_values)}")
        keys = image_keys(pixel_values) if self.use_cache else None
        latents, _ = posterior_of(self.backbone, pixel_values, keys=keys)
        return heat_maps(
            self.backbone,
            latents,
            text,
            words_of(text) if words is None else [words] if isinstance(words, str) else list(words),
            preset=preset,
            timesteps=config.timesteps if timesteps is None else tuple(timesteps),
            layers=layers,
            heads=heads,
            seed=self._seed(seed),
            picture=to_picture(image if config.resize == "squash" else pixel_values),
        )

    def index_bytes(self, images: int) -> int:
        """Size of the bank that `build_index` would write for so many images, in half precision.

        With `resize="none"` the config's size or the model's is assumed.
        """
        size = self.config.size or self.backbone.default_size
        height, width = (size, size) if isinstance(size, int) else size
        references = len(reference_pixels(self.config, (height, width), self.references))
        return bank_bytes(self.backbone, self.config, images + references, (height, width))

    def build_index(
        self,
        images: Images,
        folder: "str | os.PathLike[str]",
        *,
        names: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float16,
        shard_bytes: int = SHARD_BYTES,
        progress: Callable[[int], None] | None = None,
    ) -> QueryBank:
        """Keep what "shared-query" scores need of images on disk, to be searched by any text.

        Costs one pass per image, timestep and draw, and `index_bytes` of disk: choose few layers
        and timesteps for many images.

        Args:
            images: Pictures.
            folder: New or empty.
            names: Of the images; None takes their paths, or counts.
            dtype: Of what is kept.
            shard_bytes: About how large one file may become.
            progress: Told how many images are done.

        Raises:
            ConfigError: A config that scores by more than attention.
            OutputError: The folder holds something, or cannot be written.
            ImageError: A picture cannot be read.
            ShapeError: Images of different sizes, or another number of names.
            NonFiniteError: Queries that `dtype` does not hold.
        """
        pictures = as_list(images)
        if names is None:
            names = [
                str(picture) if isinstance(picture, (str, os.PathLike)) else str(index)
                for index, picture in enumerate(pictures)
            ]
        if len(names) != len(pictures):
            raise ShapeError(f"got {len(names)} names for {len(pictures)} images")
        write_bank(
            self.backbone,
            self.config,
            pictures,
            Path(folder),
            names=names,
            references=self.references,
            dtype=dtype,
            shard_bytes=shard_bytes,
            progress=progress,
        )
        return QueryBank.load(folder, backbone=self.backbone)

    def _seed(self, seed: int | None) -> int:
        return self.config.seed if seed is None else seed
