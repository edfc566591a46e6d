"""What the encoder and the scorer need of a model: components, text embeddings, taps."""

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import NotRequired  # of typing since Python 3.11

from diffenc._typing import LongPrompts, Uncond
from diffenc.checks.fields import require_finite
from diffenc.denoiser.concept_attention import Concepts
from diffenc.denoiser.shortening import ends_early, is_whole
from diffenc.denoiser.transformers import layout_of, word_for
from diffenc.errors import BackboneError, ConfigError, PromptError, ShapeError, TapError
from diffenc.inputs.noise import is_flow, signal_levels
from diffenc.inputs.prompts import PromptEmbeds, count_windows, tokenize, tokenize_windows
from diffenc.inputs.tokenizing import limit_of, limits_of, own_places
from diffenc.inputs.words import shared_positions
from diffenc.memory.cache import TensorCache
from diffenc.memory.digests import scaling_mark, schedule_mark, weights_mark, words_mark
from diffenc.memory.model_state import module_key, scheduler_key, tokenizer_key, torch_settings
from diffenc.memory.object_watch import free_to_swap, watch_of
from diffenc.models.configs import Architecture, vae_reduction
from diffenc.models.denoisers import config_of, patch_of, pooled_width, text_width
from diffenc.models.family_files import FAMILY_FILES
from diffenc.models.part_checks import check_adapters, check_components, check_width
from diffenc.models.taps import LATENTS, TapInfo, denoiser_taps, match_taps
from diffenc.models.variants import check_denoiser
from diffenc.runtime.inference import lasting, make_plain
from diffenc.runtime.precision import keep_from_overflow
from diffenc.runtime.threads import lock_of


def grad_where_trained(module: nn.Module) -> AbstractContextManager[Any]:
    """A graph where one is wanted and a parameter of the module requires a gradient, else none."""
    trained = any(parameter.requires_grad for parameter in module.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and trained)


@dataclass(frozen=True, slots=True)
class Caches:
    """What a backbone remembers, each bounded in bytes.

    Attributes:
        latents: Latents of each picture: 64 KB for 512 pixels.
        prompts: Embeddings of each text: 0.3 MB for SD 2.1 in float32.
        features: Unconditional maps per picture, noise and set of taps, on the U-Net's device.
        outputs: Outputs of the U-Net's first modules per picture and noise, on its device: 8 MB for
            what runs before a text comes in, for SD at 512 pixels in float16.
    """

    latents: TensorCache = field(default_factory=lambda: TensorCache(64 * 2**20))
    prompts: TensorCache = field(default_factory=lambda: TensorCache(64 * 2**20))
    features: TensorCache = field(default_factory=lambda: TensorCache(256 * 2**20))
    outputs: TensorCache = field(default_factory=lambda: TensorCache(256 * 2**20))

    def clear(self) -> None:
        """Forget everything."""
        for cache in (self.latents, self.prompts, self.features, self.outputs):
            cache.clear()


@dataclass(slots=True)
class CompiledTaps:
    """A U-Net compiled up to its last tap.

    Attributes:
        run: The compiled function, which returns the taps.
        options: Options of `torch.compile`.
        structure: State of the U-Net's modules and settings that it was made of.
    """

    run: Callable[..., tuple[Tensor, ...]]
    options: dict[str, Any]
    structure: int


class States:
    """What results of a backbone depend on beside their input, looked at once for each call.

    A key is None where nothing may be cached. What is computed while another thread writes weights
    belongs to the state before, which nobody asks for again.

    Args:
        backbone: Model.
    """

    def __init__(self, backbone: "Backbone") -> None:
        self._backbone = backbone

    @cached_property
    def latents(self) -> Hashable | None:
        """State of what encodes pictures."""
        vae = module_key(self._backbone.vae)
        return None if vae is None else (self._settings, vae)

    @cached_property
    def prompts(self) -> Hashable | None:
        """State of what encodes texts."""
        backbone = self._backbone
        parts = backbone.parts().items()
        texts = [module_key(part) for name, part in parts if name.startswith("text")]
        words = [tokenizer_key(each) for each in backbone.tokenizers]
        if None in texts or None in words:
            return None
        return self._settings, backbone.uncond_rule, *texts, *words

    @cached_property
    def features(self) -> Hashable | None:
        """State of everything."""
        backbone = self._backbone
        others = [
            self._denoiser[1] if part is backbone.denoiser else module_key(part)
            for name, part in backbone.parts().items()
            if name != "vae" and not name.startswith("text")
        ]
        if None in (self.latents, self.prompts, *others):
            return None
        return self.latents, self.prompts, *others, scheduler_key(backbone.scheduler)

    @property
    def structure(self) -> int:
        """Number of the U-Net's modules and settings, see `structure_key`."""
        return self._denoiser[0]

    @cached_property
    def _denoiser(self) -> tuple[int, int | None]:
        return watch_of(self._backbone.denoiser).look()

    @cached_property
    def _settings(self) -> Hashable:
        return torch_settings()


class CommonParts(TypedDict):
    """What a model of every family is made of, beside its denoiser and what encodes its texts.

    Attributes:
        name: Name of the backbone in messages and saved configs.
        vae: An `AutoencoderKL` or `AutoencoderTiny`.
        scheduler: Scheduler of diffusers that has `alphas_cumprod`.
        default_size: Side of the square that images are brought to, in pixels; None derives it from
            the denoiser's config.
        default_taps: Taps that the encoder reads when none are asked for; None takes those of the
            "gdf" preset, and of a transformer the block at half its depth.
    """

    name: str
    vae: Any
    scheduler: Any
    default_size: NotRequired[int | None]
    default_taps: NotRequired[tuple[str, ...] | None]


class UNetParts(CommonParts):
    """What a model with a U-Net is made of.

    Attributes:
        unet: Denoising U-Net (`UNet2DConditionModel`).
    """

    unet: Any


class TransformerParts(CommonParts):
    """What a model with a diffusion transformer is made of.

    Attributes:
        transformer: Diffusion transformer, of a class in `diffenc.denoiser.transformers.LAYOUTS`.
    """

    transformer: Any


class Backbone(nn.Module):
    """A diffusion model taken apart: VAE, text encoders, denoiser, schedule.

    All parts are frozen and in evaluation mode. `StableDiffusion`, `StableDiffusionXL` and the
    families of transformers take any objects with the interfaces of diffusers' and transformers'
    classes. The denoiser is registered as `unet` or `transformer`, as pipelines call it.

    Attributes:
        name: Alias, Hub id, or absolute path of the folder or file it was loaded from.
        vae: Autoencoder.
        scheduler: Holder of `alphas_cumprod` and of the prediction type.
        default_size: Side of the square that images are brought to, in pixels.
        default_taps: Taps that the encoder reads when none are asked for.
        replacements: Parts that are not the named model's own: their paths, None for objects.
        variant: Variant of the weight files that was requested, see `load_backbone`.
        caches: Latents, prompts and unconditional features that were computed before.
        reads_windows: Whether long texts may be encoded in windows.
        shares_words: Whether all tokenizers split a text in the same way.
        pads_texts: Whether every text has as many states, whatever its length.
        marks_of_texts: Number of special tokens that the first tokenizer puts around every text: 2
            for CLIP, which marks start and end.
        reads_sizes: Whether prompts tell the denoiser the size of their picture.
        reads_pooled: Whether the denoiser reads a pooled state of the text beside the others.
        pipeline: Class of diffusers' pipeline that the model is written as.
        compiled: Compiled denoiser for each tuple of taps.
        lock: Held while a call reads the model or changes it, so that threads may share it. It is
            the denoiser's: backbones on one U-Net take turns.
    """

    family: str
    unet: Any  # as the family has it
    transformer: Any
    uncond_rule: Uncond = "empty"
    reads_windows: bool = True
    pads_texts: bool = True
    marks_of_texts: int = 2
    shares_words: bool = True
    reads_sizes: bool = False
    reads_pooled: bool = False

    def __init__(
        self,
        *,
        name: str,
        vae: Any,
        scheduler: Any,
        default_size: int | None = None,
        default_taps: tuple[str, ...] | None = None,
        **denoiser: Any,  # under the name that pipelines of the family give it
    ) -> None:
        super().__init__()
        part = FAMILY_FILES[self.family].denoiser
        module = denoiser.pop(part)
        check_components(module, vae, scheduler, flow=FAMILY_FILES[self.family].flow)
        check_denoiser(config_of(module), name, pooled=self.reads_pooled)
        self.name = name
        setattr(self, part, module)
        self.vae, self.scheduler = vae, scheduler
        self.pipeline = FAMILY_FILES[self.family].pipelines[0]
        self.replacements: dict[str, str | None] = {}
        self.variant: str | None = None
        described = Architecture(
            {part: config_of(module), "vae": dict(vae.config)}, own_family=self.family
        )
        self.default_size = described.default_size if default_size is None else default_size
        self.default_taps = described.default_taps if default_taps is None else default_taps
        self.caches = Caches()
        self.compiled: dict[tuple[str, ...], CompiledTaps] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if value is None and name.startswith(("text_encoder", "tokenizer")):
            raise BackboneError(f"{name} must be there, got None; a prompt is encoded with it")
        exchanged = "replacements" in self.__dict__
        if exchanged and name in (FAMILY_FILES[self.family].denoiser, "vae", "scheduler"):
            parts = {"denoiser": self.denoiser, "vae": self.vae, "scheduler": self.scheduler}
            part = name if name in parts else "denoiser"
            check_components(**{**parts, part: value}, flow=FAMILY_FILES[self.family].flow)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{type(self).__name__}({self.name!r}, device={str(self.device)!r}, dtype={dtype})"

    def freeze(self) -> "Backbone":
        """Evaluation mode, no gradients to weights; they can be trained later, where asked for."""
        make_plain(self)
        self.eval()
        self.requires_grad_(False)
        return self

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """See the class."""
        return lock_of(self.denoiser)

    @property
    def denoiser(self) -> Any:
        """The module that is run, read and adapted: a U-Net or a transformer."""
        return getattr(self, FAMILY_FILES[self.family].denoiser)

    @property
    def is_transformer(self) -> bool:
        """Whether the denoiser is a diffusion transformer, which has no stages."""
        return layout_of(self.denoiser) is not None

    @property
    def joins_text(self) -> bool:
        """Whether picture and text are joined in one attention, so that there is none across."""
        layout = layout_of(self.denoiser)
        return layout is not None and layout.cross_attention is None

    @property
    def is_guidance_distilled(self) -> bool:
        """Whether the denoiser was distilled of guided predictions, without a half of no text."""
        return False

    @property
    def denoiser_word(self) -> str:
        """What the denoiser is called in messages: "U-Net" or "transformer"."""
        return word_for(self.denoiser)

    @property
    def noise_levels(self) -> Float[Tensor, " steps"]:
        """How much of a picture each step of the schedule leaves, see `signal_levels`."""
        return signal_levels(self.scheduler)

    @property
    def trained_size(self) -> int | None:
        """Side of the pictures that the denoiser was made for, in pixels; None: it does not say."""
        side = dict(self.denoiser.config).get("sample_size")
        return side * self.reduction if isinstance(side, int) else None

    def denoise(
        self,
        noisy_latents: Tensor,
        timesteps: int | Tensor,
        prompt_embeds: PromptEmbeds,
        *,
        run: Callable[..., tuple[Tensor, ...]] | None = None,
    ) -> tuple[Tensor, ...]:
        """Call the denoiser in its dtype and on its device.

        Args:
            noisy_latents: Noisy latents, one per row.
            timesteps: Scheduler steps: one for all rows, or one each.
            prompt_embeds: Encoded texts: one row for all latents, or one each.
            run: Compiled denoiser, or a copy of it, that is called in its place; None calls the
                denoiser.

        Raises:
            ConfigError: Something was done to the denoiser that calls would pass by.
            ShapeError: Pictures are larger than the denoiser has positions for.
        """
        check_adapters(self.denoiser, self.name)
        device, dtype = self.device, self.dtype
        called = self.denoiser if run is None else run
        latents = noisy_latents.to(device, dtype)
        steps = torch.as_tensor(timesteps, dtype=torch.long, device=device)
        texts = prompt_embeds.rows(len(noisy_latents)).to(device, dtype)
        if self.joins_text:
            texts = texts.select(0, len(texts))
            if texts.lengths is not None:
                raise ShapeError(
                    f"{self.name!r} masks no padding, so that texts of different lengths are no "
                    f"rows of one call, got {texts.lengths} states; call it for each"
                )
        if (layout := layout_of(self.denoiser)) is None:
            called = partial(called, latents, steps, **texts.unet_kwargs())
        else:
            called = partial(
                called, **layout.arguments(self.denoiser.config, latents, steps, texts)
            )
        output: tuple[Tensor, ...] = called(return_dict=False)
        if run is not None:
            return output
        return self._prediction(output[0], latents), *output[1:]

    def _prediction(self, output: Tensor, noisy_latents: Tensor) -> Tensor:
        """What the denoiser says of the noise, of all that it gives, in the form of latents."""
        return output

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        device: torch.device = next(self.denoiser.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the denoiser; the VAE may stay in float32."""
        dtype: torch.dtype = next(self.denoiser.parameters()).dtype
        return dtype

    @property
    def reduction(self) -> int:
        """Image pixels per latent cell."""
        return vae_reduction(self.vae.config)

    @property
    def multiple(self) -> int:
        """Image pixels that both sides of a picture are multiples of."""
        return self.reduction * patch_of(config_of(self.denoiser))

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: "epsilon", "v_prediction", "sample" or "flow"."""
        return "flow" if is_flow(self.scheduler) else str(self.scheduler.config.prediction_type)

    def taps(self) -> tuple[TapInfo, ...]:
        """Every readable place of the denoiser."""
        modules = self.denoiser.named_modules()
        known = {LATENTS, *(name for name, module in modules if is_whole(module))}
        every = denoiser_taps(config_of(self.denoiser), self.reduction)
        return tuple(tap for tap in every if tap.name in known)

    def match_taps(self, patterns: Sequence[str]) -> tuple[TapInfo, ...]:
        """The places that module paths or globs name, see `diffenc.match_taps`.

        Raises:
            TapError: A pattern names nothing, or something behind the end of a U-Net that was
                shortened.
        """
        if self.shortened:
            self._check_reach(patterns)
        return match_taps(patterns, self.taps())

    def _check_reach(self, patterns: Sequence[str]) -> None:
        left = self.taps()
        for pattern in patterns:
            known = denoiser_taps(config_of(self.denoiser), self.reduction)
            every = match_taps([pattern], known)
            if gone := [tap.name for tap in every if tap not in left]:
                raise TapError(
                    f"{gone[0]!r} lies behind {left[-1].name!r}, after which the "
                    f"{self.denoiser_word} of {self.name!r} was truncated when it was "
                    "loaded; load the model with this tap among those it is truncated for, or "
                    "without truncate"
                )

    @property
    def shortened(self) -> bool:
        """Whether the denoiser ends after the last tap it was loaded for, and predicts no noise."""
        return ends_early(self.denoiser)

    def embed(
        self, texts: Sequence[str], *, size: tuple[int, int], long_prompts: LongPrompts = "truncate"
    ) -> PromptEmbeds:
        """Encode texts, one row each.

        Args:
            texts: Prompts.
            size: Size of the pictures that the texts go with, (height, width) in pixels; only SDXL
                reads it.
            long_prompts: Treatment of texts beyond the encoder's limit: "truncate" cuts them and
                counts what was cut; "chunk" encodes them in windows that stand side by side. SDXL's
                pooled text is the first window's.
        """
        if long_prompts == "chunk":
            if not self.reads_windows:
                raise ConfigError(
                    f"{self.name!r} reads {limits_of(self.tokenizers)} tokens of a text at once "
                    "and was trained without windows; leave long_prompts='truncate'"
                )
            windows = [count_windows(each, texts) for each in self.tokenizers]
            counts = tuple(map(max, zip(*windows, strict=True)))
            ids = [tokenize_windows(each, texts, counts) for each in self.tokenizers]
            self._prepare_encoders(ids)
            return self._embeds(ids, counts, (0,) * len(texts), size)
        encoded = [tokenize(each, texts) for each in self.tokenizers]
        cuts = tuple(map(max, zip(*(cut for _, cut in encoded), strict=True)))
        self._prepare_encoders([ids for ids, _ in encoded])
        return self._embeds([ids for ids, _ in encoded], (1,) * len(texts), cuts, size)

    def embed_ids(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"],
        *,
        size: tuple[int, int],
    ) -> PromptEmbeds:
        """Encode texts that were tokenized before, one row each; see `embed`.

        Args:
            input_ids: Token ids of the (first) tokenizer, padded to its limit.
            attention_mask: Mask that is 1 for a text's own tokens and 0 for padding.
            size: Size of the pictures in pixels, (height, width), as for `embed`.

        Raises:
            PromptError: Rows of another length, or tokens that a text encoder does not know.
        """
        if not self.shares_words:
            raise ConfigError(
                f"the text encoders of {self.name!r} split texts in different ways, so that no ids "
                "stand for a text; pass texts, or embeddings"
            )
        limit = limit_of(self.tokenizers[0])
        if input_ids.shape[1] != limit:
            raise PromptError(
                f"prompts are of {input_ids.shape[1]} tokens, and those of {self.name!r} are "
                f"padded to {limit}: another tokenizer made them, or they lack padding. A tower's "
                "tokenize makes them, and so do processors that have its model as prompt_model"
            )
        # All tokenizers have the same words and pad with different ones.
        padding = attention_mask.to(input_ids.device) == 0
        ids = [input_ids.masked_fill(padding, each.pad_token_id) for each in self.tokenizers]
        ones = (1,) * len(input_ids)
        self._prepare_encoders(ids)
        return self._embeds(ids, ones, (0,) * len(input_ids), size)

    def _check_text_width(self, encoders: Sequence[Any]) -> None:
        """Raise a `BackboneError` unless text encoders give what the denoiser reads."""
        check_width(self.denoiser, encoders)

    def _prepare_encoders(self, ids: Sequence[Tensor]) -> None:
        """Raise a `PromptError` where a text encoder does not know a token of its tokenizer.

        Encoders that were cast to a type in which they overflow are brought to another first.
        """
        encoders: Any = [part for name, part in self.parts().items() if name.startswith("text")]
        self._check_text_width(encoders)  # which may have been exchanged
        for encoder in encoders:
            with lock_of(encoder):  # no thread may see it half way
                keep_from_overflow(encoder)
        for rows, encoder in zip(ids, encoders, strict=True):
            size = encoder.config.vocab_size
            if rows.numel() and (largest := int(rows.max())) >= size:
                raise PromptError(
                    f"a prompt holds token {largest} and a text encoder of {self.name!r} knows "
                    f"{size}: tokens were added to the tokenizer alone. Add them to each text "
                    "encoder (resize_token_embeddings), as load_textual_inversion does"
                )

    @property
    @abstractmethod
    def tokenizers(self) -> tuple[Any, ...]:
        """One for each text encoder; they differ in padding alone."""

    @abstractmethod
    def _embeds(
        self,
        ids: Sequence[Tensor],
        counts: Sequence[int],
        truncated: tuple[int, ...],
        size: tuple[int, int],
    ) -> PromptEmbeds:
        """Encode windows of token ids.

        Args:
            ids: Token ids for each tokenizer, (windows, l).
            counts: Number of windows of each text; they become one row.
            truncated: Number of tokens of each text that were cut.
            size: Size of the pictures in pixels, (height, width), as for `embed`.
        """

    def embed_uncond(self, rule: Uncond | None, *, size: tuple[int, int]) -> PromptEmbeds:
        """The unconditional embedding, one row.

        Args:
            rule: Rule of the embedding: "empty" encodes the empty text; "zeros" is what SDXL's own
                pipeline uses; None is the model's own rule.
            size: Size of the pictures in pixels, (height, width), as for `embed`.
        """
        embeds = self.embed([""], size=size)
        if (rule or self.uncond_rule) == "empty":
            return embeds
        pooled = embeds.pooled_prompt_embeds
        return PromptEmbeds(
            torch.zeros_like(embeds.prompt_embeds),
            None if pooled is None else torch.zeros_like(pooled),
            embeds.time_ids,
            embeds.truncated,
        )

    def word_positions(self, text: str, word: str) -> tuple[int, ...]:
        """Positions of a word's tokens among the states of a text.

        Raises:
            PromptError: The text has no such word, or it was cut off.
        """
        return shared_positions(self.tokenizers, text, word)

    def own_positions(self, text: str) -> tuple[int, ...]:
        """Positions of a text's own tokens, start and end included, among its states."""
        return own_places(self.tokenizers[0], text)

    def concepts(self, concepts: Sequence[str], *, size: tuple[int, int]) -> Concepts:
        """Concepts of one token each that ride along with a pass, as ConceptAttention has them.

        Args:
            concepts: One or more.
            size: Size of the pictures in pixels, (height, width), as for `embed`.

        Raises:
            ConfigError: The method is not defined for this family.
        """
        raise ConfigError(
            f"concepts are read in models that join picture and text, and {self.name!r} is "
            f"{self.family!r}; its words are mapped by word_maps without a preset"
        )

    def attended_states(self, states: Float[Tensor, "b l d"]) -> Float[Tensor, "b l _c"]:
        """Text states as the cross-attentions read them."""
        return states

    @classmethod
    def fitted_tokenizer(cls, tokenizer: Any, pipeline: str) -> Any:
        """A tokenizer that reads texts as the pipeline of the family does.

        Args:
            tokenizer: Tokenizer of the model; it is left as it is.
            pipeline: Class of the pipeline.
        """
        return tokenizer

    def check_embeds(self, embeds: PromptEmbeds) -> None:
        """Raise unless embeddings made elsewhere are what the U-Net reads.

        Raises:
            ShapeError: They have other widths, or lack something.
            NonFiniteError: NaN or infinity in them.
        """
        for name in ("prompt_embeds", "pooled_prompt_embeds", "time_ids"):
            values = getattr(embeds, name)
            if values is not None:
                require_finite(values, f"{name} that were passed", "encode the texts again")
        if embeds.prompt_embeds.ndim != 3:
            raise ShapeError(
                "prompt_embeds must be of shape (texts, states, channels), got "
                f"{tuple(embeds.prompt_embeds.shape)}; encode the texts with this backbone's "
                "`embed`"
            )
        rows, states = embeds.prompt_embeds.shape[:2]
        lengths = embeds.row_lengths()
        if len(lengths) != rows or not all(1 <= length <= states for length in lengths):
            raise ShapeError(
                f"lengths must say of each of {rows} rows how many of its {states} states are the "
                f"text's own, got {lengths}; leave lengths out where all of them are"
            )
        width = embeds.prompt_embeds.shape[-1]
        expected = text_width(config_of(self.denoiser))
        if width != expected:
            raise ShapeError(
                f"prompt embeddings have width {width}, the {self.denoiser_word} of {self.name!r} "
                f"reads {expected}; encode the texts with this backbone's `embed`"
            )
        if self.reads_pooled and not self.reads_sizes and embeds.pooled_prompt_embeds is None:
            raise ShapeError(
                f"{self.name!r} needs pooled_prompt_embeds beside the states; encode the texts "
                "with this backbone's `embed`"
            )
        sized = self.denoiser.config.get("addition_embed_type") == "text_time"
        if sized and (embeds.pooled_prompt_embeds is None or embeds.time_ids is None):
            raise ShapeError(
                f"{self.name!r} needs pooled_prompt_embeds and time_ids beside the states; encode "
                "the texts with this backbone's `embed`"
            )
        for name, channels in (
            ("pooled_prompt_embeds", pooled_width(config_of(self.denoiser))),
            ("time_ids", 6 if sized else None),
        ):
            values = getattr(embeds, name)
            if channels and tuple(values.shape) != (rows, channels):
                raise ShapeError(
                    f"{name} must be of shape ({rows}, {channels}), one row for each text, got "
                    f"{tuple(values.shape)}; encode the texts with this backbone's `embed`"
                )

    def mark(self) -> dict[str, list[float]]:
        """Numbers of each part by which the model is known again, of its weights and settings."""
        words = {name: part for name, part in vars(self).items() if name.startswith("tokenizer")}
        return {
            **{name: weights_mark(part) for name, part in self.parts().items()},
            "scheduler": schedule_mark(self.scheduler),
            "vae.config": scaling_mark(self.vae.config),
            **{name: words_mark(part) for name, part in words.items()},
        }

    def states(self) -> States:
        """Keys of the present state of the parts, for the caches of one call."""
        return States(self)

    def clear_caches(self) -> None:
        """Forget everything; needed after weights were written through `.data`."""
        self.caches.clear()

    @lasting
    def _apply(self, fn: Any, recurse: bool = True) -> "Backbone":
        with self.lock:
            self.clear_caches()  # another device or dtype
            free_to_swap(self.parts().values())
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def parts(self) -> dict[str, nn.Module]:
        """Named components that hold weights."""
        return dict(self.named_children())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled": {}}  # compiled code is neither copied nor pickled
