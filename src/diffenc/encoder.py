"""A diffusion U-Net as a vision encoder that reads the question."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc._typing import Conditioning, Prediction
from diffenc.checks.arguments import flag, number, shown, text, texts, whole
from diffenc.config import EncoderConfig, check_choice, check_is_config, described
from diffenc.denoiser.grids import middle_grid
from diffenc.denoiser.lora.adapters import is_merged
from diffenc.errors import ConfigError, OutputError, PromptError
from diffenc.features import Features, check_guidance
from diffenc.inputs.images import Images, as_list, decoded, image_sizes, to_pixel_values
from diffenc.inputs.prompts import PromptEmbeds, match_batch
from diffenc.inputs.tokenizing import limits_of
from diffenc.inputs.transform import Transform
from diffenc.memory.object_watch import object_key
from diffenc.models import Architecture, TapInfo, load_backbone, model_name
from diffenc.models.base import Backbone
from diffenc.models.device import Device, Dtype
from diffenc.models.encoder_folder import (
    BACKBONE_FOLDER,
    CAPTIONER_FOLDER,
    LORA_FOLDER,
    Contents,
    begin,
    check_mark,
    is_saved,
    merge_parts,
    read_config,
    write_config,
)
from diffenc.models.pipelines import PIPELINE
from diffenc.models.presets import naming_preset, preset_options
from diffenc.models.sources import lasting_source
from diffenc.models.taps import LATENTS, tap_patterns
from diffenc.models.writing import write_folder
from diffenc.passes.encoded import image_keys, posterior_of
from diffenc.passes.forward import AttentionRead, attention_key, compile_taps
from diffenc.passes.halves import check_discard, read_halves
from diffenc.passes.question_tokens import prompt_words, question_tokens, token_channels
from diffenc.passes.reuse import check_reuse
from diffenc.passes.texts import text_halves
from diffenc.passes.word_tokens import (
    Spans,
    WordTokens,
    gather_words,
    positions_of,
    word_layers,
    word_spans,
)
from diffenc.runtime.inference import lasting
from diffenc.storage.names import checked_path
from diffenc.tuning.parts import TrainableParts


class DiffusionEncoder(TrainableParts):
    """Text-conditioned visual features from the U-Net of a text-to-image model.

    Images are encoded by the VAE, noised, and passed once through the U-Net under the prompt;
    nothing is generated. The backbone is a registered submodule: `.to()`, `.half()` and
    `state_dict` reach it. It is frozen; `add_lora` and `add_captioner` add what trains.

    Attributes:
        backbone: The text-to-image model whose U-Net gives the features.
        config: Options of the encoder: which taps are read, at which timestep, and how.
        captioner: The implicit captioner; None where none was added.
        clip: The frozen CLIP whose image embedding the captioner reads; None without a captioner.
        use_cache: Whether to remember latents, prompts and unconditional features of frozen parts,
            so that a second question about an image costs only one conditional pass.

    Examples:
        >>> encoder = DiffusionEncoder.from_pretrained("shapes")
        >>> encoder(picture, "what color is the circle?").shape
        torch.Size([1, 64, 224])
    """

    def __init__(
        self, backbone: Backbone, config: EncoderConfig | None = None, *, use_cache: bool = True
    ) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise ConfigError(
                f"an encoder is made of a Backbone, got {shown(backbone)}; another encoder has its "
                "own as .backbone, and DiffusionEncoder.from_pretrained takes a name, folder or "
                "pipeline"
            )
        self.backbone = backbone
        self.config = config if config is not None else EncoderConfig()
        self.use_cache = flag("use_cache", use_cache)
        self._matched: tuple[object, tuple[TapInfo, ...]] = (None, ())
        check_reuse(backbone, self.config.reuse, [tap.name for tap in self._taps])
        check_discard(self.config.discard, self._taps)
        length = len(backbone.noise_levels)
        if max(self.config.timesteps) >= length:
            raise ConfigError(
                f"timestep must be in [0, {length}) for the schedule of {backbone.name!r}, got "
                f"{max(self.config.timesteps)}"
            )
        if self.config.original_size is not None and not backbone.reads_sizes:
            raise ConfigError(
                f"original_size is read by SDXL alone; {backbone.name!r} is no SDXL: leave it out"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "config":
            check_is_config(value, EncoderConfig, "timestep=10")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        facts: dict[str, object] = {
            "model": self.backbone.name,
            "taps": tuple(tap.name for tap in self.feature_info),
            "timestep": self.config.timestep,
            "conditioning": self.config.conditioning,
            "device": str(self.device),
            "dtype": self.dtype,
        }
        if self.lora_names:
            facts["lora"] = self.lora_names
        if self.captioner is not None:
            facts["captioner"] = True
        return described(type(self).__name__, facts, self.config)

    @classmethod
    @lasting
    def from_pretrained(
        cls,
        name: Any,
        *,
        device: Device = None,
        dtype: Dtype = None,
        use_cache: bool = True,
        preset: str | None = None,
        truncate: bool = False,
        channels_last: bool | None = None,
        architecture: "str | os.PathLike[str] | None" = None,
        prediction_type: Prediction | None = None,
        variant: str | None = None,
        unet: Any = None,
        transformer: Any = None,
        vae: Any = None,
        text_encoder: Any = None,
        text_encoder_2: Any = None,
        tokenizer: Any = None,
        tokenizer_2: Any = None,
        clip: Any = None,
        trainable: bool = False,
        **options: Any,  # attributes of EncoderConfig, which checks their names
    ) -> "DiffusionEncoder":
        """Load an encoder.

        Args:
            name: Model to load, see `load_backbone`: an alias, a Hub id, a diffusers folder, a
                `.safetensors` checkpoint, a pipeline of diffusers or a `Backbone`; or a folder that
                `save_pretrained` wrote. An alias wins over a folder of that name, which is
                "./name"; a folder wins over a Hub id.
            device: Device of the model; for this and the next see `load_backbone`.
            dtype: Floating point type of the U-Net and the text encoders. The VAE stays in float32
                where float16 overflows.
            use_cache: Whether to remember latents, prompts and unconditional features; see the
                class.
            preset: Name of a published method whose taps and options are taken: "gdf", "mustafar",
                "dift", "cleandift", "hyperfeatures" or "ditf", see `diffenc.models.presets`. None
                takes no preset.
            truncate: Whether to leave out everything behind the last tap, which gives the same
                features with less memory. Such an encoder has no later taps and predicts no noise.
            channels_last: Memory format of convolutions; for this and all up to `tokenizer_2` see
                `load_backbone`.
            architecture: Alias or folder whose configs describe a single file.
            prediction_type: Kind of the U-Net's prediction, where the model does not state it.
            variant: Word in the names of the weight files, such as "fp16".
            unet: Replacement for the model's own U-Net.
            transformer: Replacement for the model's own transformer.
            vae: Replacement for the model's own VAE.
            text_encoder: Replacement for the model's own text encoder.
            text_encoder_2: Replacement for SDXL's second text encoder.
            tokenizer: Replacement for the tokenizer of the text encoder.
            tokenizer_2: Replacement for the tokenizer of SDXL's second text encoder.
            clip: CLIP model of the saved captioner, see `add_captioner`; None loads the one that
                the saved captioner names.
            trainable: Whether the saved adapter in use and the saved captioner go on training.
            options: Attributes of `EncoderConfig`, such as `taps`, `timestep` or `size`. They win
                over a preset, and a preset wins over a saved config.

        Raises:
            BackboneError: The model is unknown, missing, incomplete or broken, or a part does not
                fit.
            ConfigError: An option is unknown or not allowed, or the device lacks the dtype.
            TapError: A tap does not exist in this model.
        """
        parts: dict[str, Any] = {
            "architecture": architecture,
            "prediction_type": prediction_type,
            "unet": unet,
            "transformer": transformer,
            "vae": vae,
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
        }
        truncate, trainable = flag("truncate", truncate), flag("trainable", trainable)
        config, contents, folder = EncoderConfig(), None, Path()
        replaced = [part for part, value in parts.items() if value is not None]
        if isinstance(name, (str, os.PathLike)) and is_saved(model_name(name)):
            folder = Path(lasting_source(name))
            config, contents = read_config(folder)
            name = folder / BACKBONE_FOLDER if contents.included else contents.backbone
            parts.update(merge_parts(_resolved(contents.parts, folder), parts, folder))
            truncate = truncate or contents.truncated
            variant = contents.variant if variant is None else variant
            if variant != contents.variant:  # other weights, as the caller wants them
                replaced += contents.mark
        if clip is not None and not (contents and contents.captioner):
            raise ConfigError(
                "clip= is for the captioner of a saved encoder, and this model holds none; call "
                "add_captioner(clip) afterwards"
            )
        if isinstance(name, Backbone) and truncate:
            raise ConfigError("a Backbone is not truncated; pass the name that it is loaded by")

        @naming_preset(preset if options.get("taps") is None else None)
        def choose_taps(model: Backbone | Architecture) -> list[str] | None:
            """Make the config and check its taps, before weights are loaded."""
            nonlocal config
            published = (
                {} if preset is None else preset_options(text("preset", preset), model.family)
            )
            config = _changed(config, {**published, **options})
            taps = model.match_taps(config.taps or model.default_taps)
            return [tap.name for tap in taps] if truncate else None

        is_loaded = isinstance(name, Backbone)
        if is_loaded:
            choose_taps(name)
        backbone = load_backbone(
            name,
            device=device,
            dtype=dtype,
            keep_taps=None if is_loaded else choose_taps,
            channels_last=channels_last,
            variant=variant,
            **parts,
        )
        encoder = cls(backbone, config, use_cache=use_cache)
        if contents is not None:
            check_mark(backbone, contents.mark, folder, exchanged=replaced)
            encoder._restore(folder, contents, clip=clip, trainable=trainable)
        return encoder

    def _restore(self, folder: Path, contents: Contents, *, clip: Any, trainable: bool) -> None:
        for name in contents.lora:
            self.load_lora(folder / LORA_FOLDER / name, name=name)
        if contents.lora:
            self.set_lora(contents.active_lora, trainable=trainable and not contents.merged)
        if contents.merged:
            self.merge_lora()
        if contents.captioner:
            self.load_captioner(folder / CAPTIONER_FOLDER, clip=clip, trainable=trainable)

    def save_pretrained(
        self, folder: "str | os.PathLike[str]", *, include_backbone: bool | None = None
    ) -> None:
        """Write the config, every adapter, the captioner, and a reference to the backbone.

        Loading finds parts that were given as paths again; those given as objects have to be passed
        anew, as has a captioner's CLIP without a name. Loading an unfinished folder fails.

        Args:
            folder: Folder to write to; see `diffenc.models.encoder_folder` for what lies where.
            include_backbone: Whether to write the backbone's weights too, in its dtype, as a
                diffusers folder; the result then needs nothing else, except for a captioner's CLIP.
                None writes them where weights of the backbone itself require a gradient, and so
                may not be what its name stands for.

        Raises:
            OutputError: The folder cannot be written.
            ConfigError: The backbone was given as a pipeline, which no file can name; include it.
        """
        if include_backbone is None:
            include_backbone = self._trains_backbone()
        include_backbone = flag("include_backbone", include_backbone)
        target = checked_path("a saved encoder", folder, error=OutputError)
        backbone, config = self.backbone, self.config
        if PIPELINE in backbone.replacements and not include_backbone:
            raise ConfigError(
                f"{backbone.name} was given as an object, which a config cannot name: pass "
                "include_backbone=True, or load the encoder from the folder of the pipeline"
            )
        begin(target)
        for name in self.lora_names:
            self.save_lora(target / LORA_FOLDER / name, name=name)
        if self.captioner is not None:
            self.captioner.save_pretrained(target / CAPTIONER_FOLDER, clip=self.clip)
        parts = backbone.replacements
        if include_backbone:
            write_folder(backbone, target / BACKBONE_FOLDER)
            parts = _included_parts(backbone)
            # The folder does not know what an alias reads by default.
            config = replace(
                config,
                taps=tuple(tap.name for tap in self._taps),
                size=config.size or backbone.default_size,
            )
        contents = Contents(
            backbone=backbone.name,
            variant=None if include_backbone else backbone.variant,
            parts=parts,
            included=include_backbone,
            truncated=include_backbone and backbone.shortened,
            lora=self.lora_names,
            active_lora=self.active_lora,
            merged=is_merged(backbone.denoiser),
            captioner=self.captioner is not None,
            mark=backbone.mark(),
        )
        write_config(target, config, contents)

    def _trains_backbone(self) -> bool:
        added = {id(parameter) for parameter in self._precise().values()}
        return any(p.requires_grad and id(p) not in added for p in self.backbone.parameters())

    def with_options(self, **options: Any) -> "DiffusionEncoder":
        """Another encoder over the same backbone, adapters and captioner: nothing is loaded again.

        Args:
            options: Attributes of `EncoderConfig` that change, such as `timestep` or `taps`.

        Raises:
            ConfigError: An option is unknown or not allowed.
            TapError: A tap does not exist in this model, or lies behind where it was truncated.

        Examples:
            >>> encoder = DiffusionEncoder.from_pretrained("shapes")
            >>> encoder.with_options(timestep=300, grid=4)(picture, "a circle").shape
            torch.Size([1, 16, 224])
        """
        config = _changed(self.config, options)
        other = type(self)(self.backbone, config, use_cache=self.use_cache)
        other.captioner, other.clip = self.captioner, self.clip
        other._waiting, other._compile_options = self._waiting, self._compile_options
        other.train(self.training)
        return other

    @property
    def _taps(self) -> tuple[TapInfo, ...]:  # type: ignore[override]  # an attribute to the parts
        """What is read from the U-Net that is there now, by the config of now."""
        patterns = self.config.taps or self.backbone.default_taps
        now = (patterns, object_key(self.backbone.denoiser))
        if self._matched[0] != now:
            self._matched = (now, self.backbone.match_taps(patterns))
        return self._matched[1]

    @property
    def feature_info(self) -> tuple[TapInfo, ...]:
        """Per tap, in the order in which features are returned: name, channels, reduction."""
        return self._taps

    @property
    def transform(self) -> Transform:
        """A picture's way to the pixel values that the encoder reads, for a `DataLoader`.

        With `original_size="image"` SDXL is told the picture's own size, which pixel values no
        longer have: pass pictures then.
        """
        config, backbone = self.config, self.backbone
        return Transform(config.size or backbone.default_size, config.resize, backbone.multiple)

    @property
    def hidden_size(self) -> int:
        """Channels of a token: of all taps together, twice that for "concat", and its place's."""
        return sum(self.token_channels)

    @property
    def token_channels(self) -> tuple[int, ...]:
        """Channels of a token that come from each tap and half, in order; see `Projector`.

        Where there are tokens of words, the last are of the token's place.
        """
        return token_channels(self.config, self._taps)

    @property
    def device(self) -> torch.device:
        """Device of the U-Net."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's."""
        return self.backbone.dtype

    def compile(self, **options: Any) -> None:
        """Compile the U-Net up to the last tap, without graph breaks.

        The first call of each batch and image size compiles, and takes minutes for a real model.
        Features stay within the dtype's rounding of the eager ones. Where `add_lora` or `load_lora`
        puts new layers in, this is done again with the same options.

        Args:
            options: Keyword arguments of `torch.compile`, such as `mode` and `dynamic`.

        Raises:
            ConfigError: The config has `reuse` or `discard`, for which nothing is compiled.
        """
        if self.config.discard is not None:
            raise ConfigError(
                f"with discard={self.config.discard} the norm that is tapped runs behind the pass, "
                "which is not compiled; leave discard out or do without compile"
            )
        if self.config.reuse is not None:
            raise ConfigError(
                f"with reuse={self.config.reuse!r} a pass begins in the middle of the U-Net, which "
                "is not compiled; leave reuse out or do without compile"
            )
        names = [tap.name for tap in self._taps if tap.name != LATENTS]
        compile_taps(self.backbone, names, **options)
        self._compile_options = options

    def forward(
        self,
        images: Images,
        prompts: str | Sequence[str] | PromptEmbeds | None = None,
        *,
        grid: int | tuple[int, int] | None = None,
    ) -> Float[Tensor, "b *t n c"]:
        """Tokens in place of a CLIP encoder's, by the config's `tokens`.

        Those of the grid are `extract(images, prompts).tokens()`. Tokens of words are those of
        `word_tokens`, each with its place as further channels; a prompt with fewer words than
        `word_count` leaves tokens of zeros, and one without any, like no prompt, has the mean of
        the cells as its last token.

        Args:
            images: One or several pictures, see `extract`.
            prompts: One text for all images or one for each, see `extract`.
            grid: Side, or (height, width), of the token grid; None takes the config's.

        Raises:
            DiffencError: As `extract`.
            PromptError: Tokens of words under texts that were encoded before.
        """
        if prompts is None and self.config.tokens != "grid":
            warnings.warn(
                f"tokens={self.config.tokens!r} are gathered by the words of a prompt, and there "
                "is none: all but the last of them are zeros. Pass the question as prompts.",
                stacklevel=3,
            )
        tokens, features = self.tokens_and_features(images, prompts, grid=grid)
        self._tell_of_cuts(features)  # tokens do not
        return tokens

    encode = forward

    def tokens_and_features(
        self,
        images: Images,
        prompts: str | Sequence[str] | PromptEmbeds | None = None,
        *,
        grid: int | tuple[int, int] | None = None,
    ) -> tuple[Float[Tensor, "b *t n c"], Features]:
        """The tokens of `forward`, and the features of the same pass.

        Args:
            images: One or several pictures, see `extract`.
            prompts: One text for all images or one for each, see `extract`.
            grid: Side, or (height, width), of the token grid; None takes the config's.

        Raises:
            DiffencError: As `forward`.
        """
        if self.config.tokens == "grid":
            features = self.extract(images, prompts)
            return features.tokens(grid), features
        images = decoded(images)
        if isinstance(prompts, Iterator):
            prompts = list(prompts)  # for the texts and for their words
        layers = word_layers(self.backbone, [tap.name for tap in self._taps], None)
        windows = self.config.long_prompts == "chunk"
        tokenizers = self.backbone.tokenizers
        words = prompt_words(tokenizers, prompts, len(images), windows=windows)
        features, attention = self._read_words(images, prompts, words, layers)
        return question_tokens(features, attention, words, self.config, grid), features

    @overload
    def extract(
        self,
        images: Images,
        prompts: str | Sequence[str] | PromptEmbeds | None = None,
        *,
        conditioning: Conditioning | None = None,
        guidance_scale: float | None = None,
        output: Literal["features"] = "features",
    ) -> Features: ...

    @overload
    def extract(
        self,
        images: Images,
        prompts: str | Sequence[str] | PromptEmbeds | None = None,
        *,
        conditioning: Conditioning | None = None,
        guidance_scale: float | None = None,
        output: Literal["list"],
    ) -> list[Tensor]: ...

    def extract(
        self,
        images: Images,
        prompts: str | Sequence[str] | PromptEmbeds | None = None,
        *,
        conditioning: Conditioning | None = None,
        guidance_scale: float | None = None,
        output: Literal["features", "list"] = "features",
    ) -> Features | list[Tensor]:
        """Feature maps per tap.

        Args:
            images: One or several pictures of any kind, see
                `diffenc.inputs.images.to_pixel_values`.
            prompts: One text for all images or one for each, or texts encoded before; "" is a text
                too. None is no prompt: unconditional, or the captioner's tokens alone where there
                is a captioner.
            conditioning: Conditioning of the features. "uncond" and "cond" run the U-Net once per
                image, "cfg" and "concat" run both halves in one fused call. None takes the
                config's, which is "cond" with prompts or a captioner and "uncond" without.
            guidance_scale: Guidance scale s in f_u + s (f_c - f_u), for "cfg"; None takes the
                config's.
            output: Form of the result: "features" is a mapping by tap; "list" gives the maps alone,
                from fine to coarse, as timm's `features_only` and heads for several scales have it.

        Returns:
            One map (b, channels, h, w) per tap, in tap order; (b, timesteps, channels, h, w) where
            the config has several timesteps.

        Raises:
            ImageError: A picture cannot be read.
            ShapeError: Sizes that the model does not take.
            PromptError: A prompt is no text, or their number fits the images in no way.
            ConfigError: A conditioning that needs prompts, without prompts; a guidance scale
                that nothing reads.
            NonFiniteError: NaN or infinity in the features.

        Source:
            Features under a text and their guidance: "Multimodal Understanding using Stable
            Diffusion as a Task Aware Feature Extractor", section 5.
        """
        check_choice("output", output, ("features", "list"))
        features, _ = self._read(images, prompts, conditioning, guidance_scale)
        return features.to_list() if output == "list" else features

    def word_tokens(
        self,
        images: Images,
        prompts: str | Sequence[str],
        words: str | Sequence[str] | None = None,
        *,
        count: int | None = None,
        layers: str | Sequence[str] | None = None,
        power: float = 1.0,
        rest: bool = False,
        conditioning: Conditioning | None = None,
        guidance_scale: float | None = None,
    ) -> WordTokens:
        """Tokens that the words of a text gather, each with its place in the picture.

        For a word w whose cross-attention is spread over the cells x as A_w(x), its token is the
        sum of A_w(x) f(x) over x. Attention is read in the pass that gives the features f. Layers
        are joined by `diffenc.denoiser.gathering.join_layers`.

        Args:
            images: One or several pictures of any kind, see
                `diffenc.inputs.images.to_pixel_values`.
            prompts: One text for all images or one for each.
            words: Words that gather, a token each: words of a text, or several in a row ("red
                circle"). A text without one of them gets an absent token there; None is every word
                of each text.
            count: Number of words per image, the same for all: where a text has more, those whose
                maps are sharp and lie apart; where it has fewer, absent tokens. None keeps all.
            layers: Cross-attentions that are read, see
                `diffenc.denoiser.attention.match_layers`. None takes those of the decoder that the
                taps depend on or lie in, so that the pass ends where it does without them.
            power: Exponent of the maps, above 0; above 1 peaks count for more.
            rest: Whether a last token is gathered by the attention that the words leave: that of
                the start and end tokens, of marks, and of words that `words` does not name. Words
                that `count` leaves out are not in it.
            conditioning: Conditioning of the features that are gathered, see `extract`; attention
                is read under the text in any case. None takes the config's.
            guidance_scale: Guidance scale s in f_u + s (f_c - f_u), for "cfg".

        Returns:
            Tokens with places, maps, mask and words, and the features of the pass.

        Raises:
            PromptError: No texts, or encoded ones; a word that no text has.
            ConfigError: A number out of range.
            TapError: No cross-attention by that name.

        Examples:
            >>> encoder = DiffusionEncoder.from_pretrained("shapes")
            >>> question = encoder.word_tokens(picture, "what color is the circle?", "circle")
            >>> question.tokens.shape, question.places.shape
            (torch.Size([1, 1, 224]), torch.Size([1, 1, 4]))
        """
        if number("power", power) <= 0:
            raise ConfigError(f"power must be above 0, got {power}")
        if count is not None:
            count = whole("count", count, least=1)
        if isinstance(prompts, PromptEmbeds) or prompts is None:
            raise PromptError(f"words are looked up in texts: pass texts, got {shown(prompts)}")
        rest = flag("rest", rest)
        chosen = None if words is None else texts("words", words, error=PromptError)
        reads = word_layers(self.backbone, [tap.name for tap in self._taps], layers)
        images = decoded(images)
        each = match_batch(prompts, len(images))
        each = each * len(images) if len(each) == 1 else each
        windows = self.config.long_prompts == "chunk"
        spans = word_spans(self.backbone.tokenizers, each, chosen, windows=windows)
        features, attention = self._read_words(
            images, each, spans, reads, conditioning, guidance_scale
        )
        self._tell_of_cuts(features)
        return gather_words(features, attention, spans, count=count, power=power, rest=rest)

    def _tell_of_cuts(self, features: Features) -> None:
        """Warn where prompts were cut, in words that are the same for every batch."""
        if any(features.truncated):
            limit = limits_of(self.backbone.tokenizers)
            warnings.warn(
                f"prompts are longer than the {limit} tokens that the text encoder reads, and were "
                "cut: words behind that have no effect. Shorten them, or read all of them with "
                'long_prompts="chunk".',
                stacklevel=3,
            )

    def _read_words(
        self,
        images: Images,
        prompts: str | Sequence[str] | PromptEmbeds | None,
        words: Sequence[Spans],
        layers: tuple[str, ...],
        conditioning: Conditioning | None = None,
        guidance_scale: float | None = None,
    ) -> tuple[Features, list[Float[Tensor, "b *t tokens _h _w"]]]:
        """Features, and attention to the words of the prompts; none where no prompt has a word."""
        needed = self._conditioning(conditioning, prompts)
        check_guidance(guidance_scale, needed)
        positions = positions_of(words)
        if not positions:
            return self._read(images, prompts, needed, guidance_scale)
        reading = AttentionRead(layers, positions)
        both = "concat" if needed == "uncond" else needed  # attention needs the text
        features, attention = self._read(images, prompts, both, guidance_scale, reading)
        return features if both == needed else features.select(needed), attention

    def _read(
        self,
        images: Images,
        prompts: str | Sequence[str] | PromptEmbeds | None,
        conditioning: Conditioning | None,
        guidance_scale: float | None,
        attention: AttentionRead | None = None,
    ) -> tuple[Features, list[Float[Tensor, "b *t tokens _h _w"]]]:
        """Features, and attention to tokens of the texts at each cross-attention that is read."""
        conditioning = self._conditioning(conditioning, prompts)
        check_guidance(guidance_scale, conditioning)
        config, backbone = self.config, self.backbone
        several_readers = self.captioner is not None or config.original_size == "image"
        images = decoded(images) if several_readers else as_list(images)
        pixel_values = to_pixel_values(
            images,
            size=config.size or backbone.default_size,
            resize=config.resize,
            multiple=backbone.multiple,
        )
        size = (pixel_values.shape[2], pixel_values.shape[3])
        keys = image_keys(pixel_values) if self.use_cache else None
        batch = len(pixel_values)
        with backbone.lock:  # a call sees one state of the model: adapters, weights, device
            states = backbone.states()
            posteriors = posterior_of(
                backbone, pixel_values, keys=keys, states=states, batch_size=config.batch_size
            )
            sizes = self._original_sizes(images, batch)
            uncond, cond = text_halves(
                backbone,
                config,
                prompts,
                conditioning,
                batch=batch,
                size=size,
                sizes=sizes,
                states=states,
                use_cache=self.use_cache,
                change=partial(self.caption, images),
            )
            halves = read_halves(
                backbone,
                config,
                [tap.name for tap in self._taps],
                posteriors,
                keys=None if keys is None else list(zip(keys, sizes or keys, strict=True)),
                states=states,
                uncond=uncond if conditioning != "cond" else None,
                cond=cond,
                textless=uncond,
                attention=attention,
            )
        under, layers = halves["cond"] or {}, () if attention is None else attention.layers
        read = [under.pop(attention_key(layer)) for layer in layers]
        first = next(half for half in halves.values() if half is not None)
        grid = config.grid or middle_grid([(m.shape[-2], m.shape[-1]) for m in first.values()])
        features = Features(
            **halves,
            conditioning=conditioning,
            guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
            grid=(grid, grid) if isinstance(grid, int) else grid,
            truncated=() if cond is None else cond.truncated,
        )
        return features, read

    def _original_sizes(self, images: Images, batch: int) -> list[tuple[int, int]] | None:
        """Size of each picture for SDXL, (height, width); None leaves the processed size."""
        original = self.config.original_size
        if original is None:
            return None
        return image_sizes(images) if original == "image" else [original] * batch

    def _conditioning(self, conditioning: Conditioning | None, prompts: object) -> Conditioning:
        unprompted = prompts is None and self.captioner is None
        chosen = self.config.conditioning if conditioning is None else conditioning
        if chosen is None:
            chosen = "uncond" if unprompted else "cond"
        check_choice("conditioning", chosen, get_args(Conditioning))
        if unprompted and chosen != "uncond":
            raise ConfigError(f"conditioning {chosen!r} needs prompts; got none")
        if chosen in ("cfg", "concat") and self.backbone.is_guidance_distilled:
            raise ConfigError(
                f"{self.backbone.name!r} was distilled of guided predictions and has no "
                f"unconditional half beside the text's, so that conditioning {chosen!r} means "
                "nothing; take 'cond' or 'uncond' (the empty text)"
            )
        return chosen


_TINY_VAE = f"{BACKBONE_FOLDER}/vae"


def _changed(config: EncoderConfig, options: Mapping[str, Any]) -> EncoderConfig:
    """A config with other options."""
    kept = config.to_dict()
    if options.get("tokens") == "grid":
        del kept["word_count"]  # it counts tokens of words, which are not wanted any more
    taps = {"taps": tap_patterns(options["taps"])} if options.get("taps") is not None else {}
    return EncoderConfig.from_dict({**kept, **options, **taps})


def _included_parts(backbone: Backbone) -> dict[str, str | None]:
    """Parts of an included backbone that its folder alone does not lead to."""
    vae: Any = backbone.vae
    return {"vae": _TINY_VAE} if type(vae).__name__ == "AutoencoderTiny" else {}


def _resolved(parts: Mapping[str, str | None], folder: Path) -> dict[str, str | None]:
    return {name: str(folder / part) if part == _TINY_VAE else part for name, part in parts.items()}
