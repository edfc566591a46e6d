"""How well images and texts agree, and where in an image a word is seen."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffenc.attention import match_layers
from diffenc.attention_scores import layer_mix
from diffenc.backbones import load_backbone
from diffenc.backbones.base import Backbone
from diffenc.cache import TensorCache
from diffenc.errors import ConfigError, PromptError, ShapeError
from diffenc.images import Images, ImageSource, as_list, to_pixel_values
from diffenc.memo import image_keys, posterior_of
from diffenc.prompts import match_batch
from diffenc.scoring.calibration import References, reference_pixels
from diffenc.scoring.config import SCORE_TIMESTEPS, ScorerConfig, scorer_preset
from diffenc.scoring.denoising import denoising_scores
from diffenc.scoring.inputs import ScoreInputs, encode_inputs, warn_truncated
from diffenc.scoring.layer_weights import fit_layer_weights
from diffenc.scoring.pairs import pair_scores
from diffenc.scoring.query_bank import SHARD_BYTES, QueryBank, bank_bytes, write_bank
from diffenc.scoring.result import Scores, stack_trials
from diffenc.scoring.saved import is_saved_scorer, read_scorer, write_scorer
from diffenc.scoring.screening import Candidates, successive_halving
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

_ROW_BYTES, _QUERY_BYTES = 16 * 2**20, 512 * 2**20


class CrossAttnScorer(nn.Module):
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

    def __init__(
        self,
        backbone: Backbone,
        config: ScorerConfig | None = None,
        *,
        use_cache: bool = True,
        references: References | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config or ScorerConfig()
        self.use_cache = use_cache
        self._references = references
        self._rows, self._queries = TensorCache(_ROW_BYTES), TensorCache(_QUERY_BYTES)
        if self.config.attention:
            layer_mix(self.config.layer_weights, len(self.layers))  # checks both

    @classmethod
    def from_pretrained(
        cls,
        name: "str | os.PathLike[str] | Backbone",
        *,
        preset: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        use_cache: bool = True,
        **options: Any,  # attributes of ScorerConfig, which checks their names
    ) -> "CrossAttnScorer":
        """Load a scorer.

        Args:
            name: An alias ("shapes", "sd1.5", "sd2.1-base", "sd2.1", "sdxl"), a Hub id, a diffusers
                folder, a folder that `save_pretrained` wrote, or a `Backbone`.
            preset: "calibrated", "paper", "discffusion" or "diffusion-classifier"; None is
                "calibrated", or what was saved.
            device: Where it runs.
            dtype: Of U-Net and text encoder; scores are computed in float32 whatever it is.
            use_cache: See the class.
            options: Attributes of `ScorerConfig`, such as `mode`, `layers` or `timesteps`; they win
                over a preset, and that over a saved config.

        Raises:
            BackboneError: The model is unknown, missing, incomplete or broken.
            ConfigError: An option or a preset is unknown or not allowed.
            TapError: A layer does not exist in this model.
        """
        values, references = scorer_preset(preset or "calibrated"), None
        parts: dict[str, Any] = {}
        if not isinstance(name, Backbone) and is_saved_scorer(name):
            saved, name, parts, references = read_scorer(Path(name))
            values = {**saved, **(scorer_preset(preset) if preset else {})}
        config = ScorerConfig.from_dict({**values, **_plain(options)})
        backbone = load_backbone(name, device=device, dtype=dtype, **parts)
        return cls(backbone, config, use_cache=use_cache, references=references)

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write config, reference images and a reference to the backbone (not its weights).

        Raises:
            OutputError: The folder cannot be written.
        """
        write_scorer(Path(folder), self.backbone, self.config, self._references)

    def with_options(self, *, preset: str | None = None, **options: Any) -> "CrossAttnScorer":
        """Another scorer over the same backbone.

        Args:
            preset: What to begin with; None is this scorer's config.
            options: Attributes of `ScorerConfig` that change.

        Raises:
            ConfigError: An option or a preset is unknown or not allowed.
        """
        values = self.config.to_dict() if preset is None else scorer_preset(preset)
        config = ScorerConfig.from_dict({**values, **_plain(options)})
        return CrossAttnScorer(
            self.backbone, config, use_cache=self.use_cache, references=self._references
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """Cross-attentions that are scored by, in the order in which they run."""
        if not self.config.attention:
            return ()
        return match_layers(self.backbone.unet, self.config.layers)

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return self.backbone.device

    def clear_cache(self) -> None:
        """Forget latents, prompts and rows; needed after writes through `.data`."""
        self.backbone.clear_caches()
        self._rows.clear()
        self._queries.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> "CrossAttnScorer":
        self._rows.clear()  # another device or dtype
        self._queries.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def calibrate(self, images: "Images | None", *, texts: Sequence[str] | None = None) -> None:
        """Take reference images, whose mean score under a text is subtracted from that text's.

        Any images do: the user's own, or those of a benchmark. References change what scores are
        compared with, never their order among images of one text.

        Args:
            images: One or more; None goes back to no calibration.
            texts: Reference texts, whose mean under an image is subtracted from that image's
                scores; None leaves the config's.

        Raises:
            ImageError: A picture cannot be read.
            PromptError: A reference text is no text.
        """
        backbone = self.backbone
        changed: dict[str, Any] = {"calibration": None, "reference_digest": None}
        self._references = None
        if images is not None:
            self._references = References.read(
                images,
                self.config,
                default_size=backbone.default_size,
                multiple=backbone.reduction,
            )
            digest = self._references.digest
            changed = {"calibration": "given", "reference_digest": digest}
        if texts is not None:
            changed["reference_texts"] = tuple(match_batch(list(texts), len(texts)))
        self.config = replace(self.config, **changed)

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
        inputs, count = self._encode(images, texts)
        pairs = torch.ones(count, len(_listed(texts)), dtype=torch.bool)
        return self._trial(inputs, pairs, seed)[0]

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
        inputs, count = self._encode(images, texts)
        if count != len(_listed(texts)):
            raise ShapeError(
                f"pairs need as many images as texts, got {count} and {len(_listed(texts))}; "
                "scorer(images, texts) scores all with all"
            )
        return self._trial(inputs, torch.eye(count, dtype=torch.bool), seed)[0].diagonal().clone()

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
        inputs, count = self._encode(images, texts)
        listed = _listed(texts)
        pairs = torch.ones(count, len(listed), dtype=torch.bool)
        first = self.config.seed if seed is None else seed
        seeds = tuple(first + trial for trial in range(trials))
        dropped = torch.zeros_like(pairs)
        results = []
        for trial_seed in seeds:
            if screen is None:
                results.append(self._trial(inputs, pairs, trial_seed))
                continue
            result, out = self._screened(inputs, pairs, trial_seed, screen, screen_over)
            results.append(result)
            dropped |= out
        scores, by_timestep = stack_trials(results)
        return Scores(
            trials=scores.masked_fill(dropped, -torch.inf),
            by_timestep=by_timestep,
            seeds=seeds,
            texts=tuple(listed),
            truncated=inputs.truncated[: len(listed)],
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
        inputs, count = self._encode(images, texts)
        pairs = torch.ones(count, len(_listed(texts)), dtype=torch.bool)
        mix = torch.eye(len(self.layers))
        inputs = replace(inputs, seed=self.config.seed if seed is None else seed)
        steps = self._pairs(inputs, pairs, self.config.steps, mix)
        return steps.mean(dim=2).permute(2, 0, 1)

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
        pixel_values = self._pixels(image)
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
            seed=config.seed if seed is None else seed,
            picture=to_picture(image if config.resize == "squash" else pixel_values),
        )

    def index_bytes(self, images: int) -> int:
        """Size of the bank that `build_index` would write for so many images, in half precision.

        With `resize="none"` the config's size or the model's is assumed.
        """
        size = self.config.size or self.backbone.default_size
        height, width = (size, size) if isinstance(size, int) else size
        references = len(reference_pixels(self.config, (height, width), self._references))
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
            references=self._references,
            dtype=dtype,
            shard_bytes=shard_bytes,
            progress=progress,
        )
        return QueryBank.load(folder, backbone=self.backbone)

    def _pixels(self, images: Images) -> Float[Tensor, "b 3 height width"]:
        config, backbone = self.config, self.backbone
        return to_pixel_values(
            images,
            size=config.size or backbone.default_size,
            resize=config.resize,
            multiple=backbone.reduction,
        )

    def _encode(self, images: Images, texts: str | Sequence[str]) -> tuple[ScoreInputs, int]:
        """Images, then references; texts, then reference texts."""
        config, listed = self.config, _listed(texts)
        pixel_values = self._pixels(images)
        size = (pixel_values.shape[2], pixel_values.shape[3])
        references = reference_pixels(config, size, self._references).to(pixel_values)
        inputs = encode_inputs(
            self.backbone,
            torch.cat([pixel_values, references]),
            [*listed, *config.reference_texts],
            config,
            seed=config.seed,
            use_cache=self.use_cache,
        )
        warn_truncated(inputs)
        return inputs, len(pixel_values)

    def _trial(
        self, inputs: ScoreInputs, pairs: Bool[Tensor, "images texts"], seed: int | None
    ) -> tuple[Float[Tensor, "images texts"], Float[Tensor, "images texts timesteps"]]:
        """Scores under one noise, and the same before the mean over timesteps."""
        config = self.config
        inputs = replace(inputs, seed=config.seed if seed is None else seed)
        steps = self._pairs(inputs, pairs, config.steps, self._mix())[..., 0]
        by_timestep = steps.unflatten(2, (len(config.timesteps), config.draws)).mean(dim=3)
        return by_timestep.mean(dim=2), by_timestep

    def _screened(
        self, inputs: ScoreInputs, pairs: Tensor, seed: int, keep: int, over: Candidates
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        inputs, config, mix = replace(inputs, seed=seed), self.config, self._mix()
        steps, dropped = successive_halving(
            lambda alive, step: self._pairs(inputs, alive, [step], mix)[:, :, 0, 0],
            (len(pairs), pairs.shape[1]),
            config.steps,
            keep=keep,
            candidates=over,
        )
        by_timestep = steps.unflatten(2, (len(config.timesteps), config.draws)).mean(dim=3)
        scores = by_timestep.mean(dim=2).masked_fill(dropped, -torch.inf)
        return (scores, by_timestep), dropped

    def _pairs(
        self, inputs: ScoreInputs, pairs: Tensor, steps: Sequence[tuple[int, int]], mix: Tensor
    ) -> Float[Tensor, "images texts steps out"]:
        return pair_scores(inputs, pairs, steps, mix, rows=self._rows, queries=self._queries)

    def _mix(self) -> Float[Tensor, "layers 1"]:
        if not self.config.attention:
            return torch.zeros(0, 1)
        return layer_mix(self.config.layer_weights, len(self.layers))


def _listed(texts: str | Sequence[str]) -> list[str]:
    count = 1 if isinstance(texts, str) or not hasattr(texts, "__len__") else len(texts)
    listed = match_batch(texts, count)
    if not listed:
        raise PromptError("got no texts; pass at least one")
    return listed


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as ScorerConfig wants them: sequences as tuples, one layer as a tuple of one."""
    plain = {k: tuple(v) if isinstance(v, (list, range)) else v for k, v in options.items()}
    layers = plain.get("layers")
    if isinstance(layers, str) and layers not in ("all", "discffusion"):
        plain["layers"] = (layers,)
    return plain
