"""How well images and texts agree, and where in an image a word is seen."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc.checks.arguments import entries, shown, sides, whole, wholes
from diffenc.checks.arguments import text as one_text
from diffenc.checks.arguments import texts as listed
from diffenc.clip.vision_models import to_image, to_pictures
from diffenc.config import check_choice
from diffenc.errors import ConfigError, OutputError, PromptError, ShapeError
from diffenc.inputs.images import Images, ImageSource, as_list, decoded
from diffenc.passes.encoded import image_keys, posterior_of
from diffenc.scoring.bank_build import SHARD_BYTES, bank_bytes, write_bank
from diffenc.scoring.base import ConfiguredScorer
from diffenc.scoring.calibration import reference_pixels
from diffenc.scoring.config import SCORE_TIMESTEPS, ScorerConfig
from diffenc.scoring.denoising import denoising_scores
from diffenc.scoring.layer_weights import fit_layer_weights
from diffenc.scoring.query_bank import QueryBank
from diffenc.scoring.result import Scores, stack_trials
from diffenc.scoring.screening import Candidates
from diffenc.scoring.trials import ScoreCall, Trial, picture_values
from diffenc.scoring.word_maps import (
    WORD_TIMESTEPS,
    heat_maps,
    pointing_layers,
    preset_places,
    text_share,
    word_maps,
    words_of,
)
from diffenc.storage.names import checked_path
from diffenc.viz.heatmap import HeatMap
from diffenc.viz.word_maps import WordMaps

_MOST_TRIALS = 2**20

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
        backbone: The text-to-image model, a registered submodule.
        config: Options that define the score.
        use_cache: Whether to remember latents, prompts and rows of frozen models that were computed
            before.

    Examples:
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
            images: One or several pictures of any kind, see
                `diffenc.inputs.images.to_pixel_values`.
            texts: One text or several.
            seed: Seed of the noise; None takes the config's.

        Returns:
            Scores in float32, on the CPU wherever the model is; higher is better.

        Raises:
            ImageError: A picture cannot be read.
            ShapeError: Sizes that the model does not take.
            PromptError: No text, or something that is none.
            NonFiniteError: NaN or infinity came out of the U-Net.
        """
        with self.backbone.lock:
            call = ScoreCall(self, images, texts)
            return call.trial(call.every_pair(), self._seed(seed))[0]

    def score_pairs(
        self, images: Images, texts: Sequence[str], *, seed: int | None = None
    ) -> Float[Tensor, " pairs"]:
        """Score image k under text k alone.

        Args:
            images: Pictures of any kind, see `diffenc.inputs.images.to_pixel_values`.
            texts: Texts, as many as images.
            seed: Seed of the noise; None takes the config's.

        Raises:
            ShapeError: Another number of texts than of images.
            ImageError: A picture cannot be read.
            PromptError: Something that is no text.
        """
        with self.backbone.lock:
            call = ScoreCall(self, images, texts)
            if call.images != len(call.texts):
                raise ShapeError(
                    f"pairs need as many images as texts, got {call.images} and "
                    f"{len(call.texts)}; scorer(images, texts) scores all with all"
                )
            pairs = torch.eye(call.images, dtype=torch.bool, device="cpu")
            scores, _ = call.trial(pairs, self._seed(seed))
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
            images: Pictures of any kind, see `diffenc.inputs.images.to_pixel_values`.
            texts: One text or several.
            trials: Number of trials; trial k takes the noise of seed + k.
            seed: Seed of the noise of the first trial; None takes the config's.
            screen: Number of candidates that are scored at every step, and so exactly; after each
                step the lower half of the candidates is dropped, until only this many are left.
                The first trial drops, and the others score what it left. None scores all
                candidates at every step.
            screen_over: Kind of candidates that compete: the "texts" of an image, or the "images"
                of a text.

        Raises:
            ConfigError: Fewer than one trial or candidate, or `screen` where it saves nothing.
            ImageError: A picture cannot be read.
            ShapeError: Sizes that the model does not take.
            PromptError: No text, or something that is none.
            NonFiniteError: NaN or infinity came out of the U-Net.
        """
        trials = whole("trials", trials, least=1, most=_MOST_TRIALS)
        screen = None if screen is None else whole("screen", screen)
        check_choice("screen_over", screen_over, get_args(Candidates))
        if screen is not None and self.config.mode == "shared-query":
            raise ConfigError("screen saves nothing with mode 'shared-query': texts cost no passes")
        seeds = tuple(self._seed(seed) + trial for trial in range(trials))
        results: list[Trial] = []
        with self.backbone.lock:
            call = ScoreCall(self, images, texts)
            pairs = call.every_pair()
            dropped = torch.zeros_like(pairs)
            if screen is not None:  # trials that each dropped others would leave none
                result, dropped = call.screened(seeds[0], screen, screen_over)
                results.append(result)
            for trial_seed in seeds[len(results) :]:
                results.append(call.trial(pairs & ~dropped, trial_seed))
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
        with self.backbone.lock:
            return ScoreCall(self, images, texts).by_layer(len(self.layers), self._seed(seed))

    def fit_layers(
        self, items: Iterable[tuple[Images, Sequence[str]]], *, seed: int | None = None
    ) -> tuple[float, ...]:
        """Choose layer weights on validation items, and take them into the config.

        Weights belong to the kind of items, the mode and the calibration that they were chosen
        with. Never choose them on the items that a result is reported for.

        Args:
            items: Items, each a pair of images and as many texts, where text k fits image k: two or
                more, and equally many in every item.
            seed: Seed of the noise; None takes the config's.

        Returns:
            One weight per layer, in the order of `layers`.

        Raises:
            ShapeError: No item, or items of another shape.
            ConfigError: A score with an error part, which belongs to no layer.
        """
        layer_scores = [
            self.layer_scores(images, texts, seed=seed) for images, texts in _pairs_of(items)
        ]
        if len({scores.shape for scores in layer_scores}) != 1:
            shapes = sorted({tuple(scores.shape[1:]) for scores in layer_scores})
            raise ShapeError(f"items must be of one shape (images, texts), got {shapes}")
        weights = fit_layer_weights(torch.stack(layer_scores))
        self.config = replace(self.config, layer_weights=weights)
        return weights

    def word_maps(
        self,
        image: ImageSource,
        text: str,
        words: str | Sequence[str] | None = None,
        *,
        preset: Literal["daam", "seg4diff", "concept-attention"] | None = None,
        layers: str | Sequence[str] | None = None,
        heads: Sequence[int] | None = None,
        timesteps: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> WordMaps:
        """Map where in an image each word of a text is seen.

        Args:
            image: A picture of any kind.
            text: Prompt that the picture is read under.
            words: Words of the prompt, or several in a row as one ("red circle"); None takes every
                word. For "concept-attention" two concepts or more, which need not stand in it.
            preset: Name of the definition: "daam" is that program's, "seg4diff" that paper's for
                SD 3: layer 9 at timestep 515, and "concept-attention" that paper's for FLUX and
                SD 3: how well the attention outputs of cell and concept agree, shared out among the
                concepts. None is the share of a cell's attention that the word gets, mean over
                heads, layers and timesteps.
            layers: Module paths of cross-attentions or of blocks around them. None takes those of
                the second block of the decoder, where words point best, and for "daam" all but the
                middle block's.
            heads: Indices of the heads that count; None takes all.
            timesteps: Noise levels, as scheduler steps. None takes two of little noise, 50 and 189,
                and for "daam" the config's.
            seed: Seed of the noise; None takes the config's.

        Returns:
            One map per word, which lies over the picture; a notebook shows both.

        Raises:
            ImageError: The picture cannot be read.
            ShapeError: More than one picture, or a size that the model does not take.
            PromptError: The text has no such word, or it was cut off.
            ConfigError: An unknown preset, or a timestep outside the schedule.
            TapError: No cross-attention by that name, or a layer without such a head.
        """
        config = self.config
        text = one_text("text", text, error=PromptError)
        images = decoded(image)  # the scorer and the figure read it
        pixel_values = picture_values(self, images)
        if len(pixel_values) != 1:
            raise ShapeError(f"word maps are of one image, got {len(pixel_values)}")
        keys = image_keys(pixel_values) if self.use_cache else None
        if words is None:
            words = words_of(text, self.backbone.tokenizer)
        squashed = config.resize == "squash"
        places = preset_places(self.backbone, preset)
        layers = places.get("layers") if layers is None else layers
        timesteps = places.get("timesteps") if timesteps is None else timesteps
        if timesteps is None:
            timesteps = WORD_TIMESTEPS if preset is None else config.timesteps
        if layers is None and preset is None:
            layers = pointing_layers(self.backbone)
        with self.backbone.lock:
            latents, _ = posterior_of(self.backbone, pixel_values, keys=keys)
            return heat_maps(
                self.backbone,
                latents,
                text,
                list(listed("words", words, error=PromptError)),
                preset=preset,
                timesteps=wholes("timesteps", timesteps),
                layers=layers,
                heads=heads,
                seed=self._seed(seed),
                picture=to_pictures(images)[0] if squashed else to_image(pixel_values[0]),
            )

    def text_share(
        self,
        image: ImageSource,
        text: str,
        *,
        layers: str | Sequence[str] | None = None,
        timesteps: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> HeatMap:
        """Map how much of its attention each cell gives to a text, against the picture itself.

        The twin, for models that join picture and text in one attention, of what the log-sum-exp
        over a text's tokens says of cross-attention: exp(LSE over the keys of the text's own tokens
        - LSE over all keys), the mean over heads, layers and timesteps. Padding counts among all
        keys, as the model sees it, and not among the text's.

        Args:
            image: A picture of any kind.
            text: Prompt that the picture is read under.
            layers: Module paths of attentions, or of blocks around them; None takes all.
            timesteps: Noise levels, as scheduler steps; None takes the config's.
            seed: Seed of the noise; None takes the config's.

        Returns:
            Shares between 0 and 1, over the picture.

        Raises:
            ImageError: The picture cannot be read.
            ShapeError: More than one picture, or a size that the model does not take.
            TapError: The model has cross-attention, or no such layer.
        """
        text = one_text("text", text, error=PromptError)
        images = decoded(image)
        pixel_values = picture_values(self, images)
        if len(pixel_values) != 1:
            raise ShapeError(f"a map is of one image, got {len(pixel_values)}")
        keys = image_keys(pixel_values) if self.use_cache else None
        chosen = self.config.timesteps if timesteps is None else wholes("timesteps", timesteps)
        squashed = self.config.resize == "squash"
        with self.backbone.lock:
            latents, _ = posterior_of(self.backbone, pixel_values, keys=keys)
            shares = text_share(
                self.backbone,
                latents,
                text,
                timesteps=chosen,
                layers=layers,
                seed=self._seed(seed),
            )
        picture = to_pictures(images)[0] if squashed else to_image(pixel_values[0])
        return HeatMap(shares[0], label=text, picture=picture)

    def index_bytes(self, images: int) -> int:
        """Size of the bank that `build_index` would write for so many images, in half precision.

        With `resize="none"` the config's size or the model's is assumed.
        """
        images = whole("images", images, least=0)
        height, width = sides("size", self.config.size or self.backbone.default_size)
        references = len(reference_pixels(self.config, (height, width), self.references))
        return bank_bytes(self.backbone, self.config, images + references, (height, width))

    def build_index(
        self,
        images: Images,
        folder: "str | os.PathLike[str]",
        *,
        names: Sequence[str] | None = None,
        dtype: torch.dtype | str = torch.float16,
        shard_bytes: int = SHARD_BYTES,
        skip_broken: bool = False,
        overwrite: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> QueryBank:
        """Store the queries of images for "shared-query" scores on disk, for search by any text.

        Costs one pass per image, timestep and draw, and `index_bytes` of disk: choose few layers
        and timesteps for many images. Every picture is read once before the first pass.

        A call that was interrupted, however that was, goes on after the last whole file when it is
        repeated with the same images, config and model; the bank is equal to one that was not
        interrupted. One program writes to a folder at a time.

        Args:
            images: Pictures of any kind, see `diffenc.inputs.images.to_pixel_values`.
            folder: Folder to write to: new or empty, or one where such a call was interrupted.
            names: Names of the images, no two alike; None takes their paths, and for images without
                a path their place in the list.
            dtype: Floating point type of the stored queries, or its name: float32, float16 or
                bfloat16.
            shard_bytes: Approximate largest size of one file, in bytes.
            skip_broken: Whether to leave out pictures that cannot be read, and name them in the
                bank's `skipped`.
            overwrite: Whether to begin anew where the folder holds a bank, or one that was begun.
            progress: Function that is called with the number of images that are done; first, in a
                folder where the call was interrupted, with the number that was done before.

        Raises:
            ConfigError: A config that scores by more than attention, names that are no texts or
                occur twice, or another dtype.
            OutputError: The folder holds something else or was begun with something else, another
                program writes to it, or it cannot be written.
            ImageError: Pictures cannot be read; it names all of them.
            ShapeError: Images of different sizes, or another number of names.
            NonFiniteError: Queries that `dtype` does not hold.
        """
        pictures = as_list(images)
        if names is None:
            names = [
                str(picture) if isinstance(picture, (str, os.PathLike)) else str(index)
                for index, picture in enumerate(pictures)
            ]
        write_bank(
            self.backbone,
            self.config,
            pictures,
            checked_path("a bank", folder, error=OutputError),
            names=names,
            references=self.references,
            dtype=dtype,
            shard_bytes=shard_bytes,
            skip_broken=skip_broken,
            overwrite=overwrite,
            progress=progress,
        )
        return QueryBank.load(folder, backbone=self.backbone)

    def _seed(self, seed: int | None) -> int:
        return whole("seed", self.config.seed if seed is None else seed)


def _pairs_of(items: object) -> Iterator[tuple[Images, Sequence[str]]]:
    """Items of images and texts.

    Raises:
        ShapeError: They are none.
    """
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes)):
        raise ShapeError(f"items must be pairs of images and texts, got {shown(items)}")
    for index, item in enumerate(entries(items)):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ShapeError(f"item {index} must be a pair of images and texts, got {shown(item)}")
        yield item[0], item[1]
