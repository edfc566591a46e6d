"""CLIP and diffusion features in one encoder: side by side, or mixed by weights that train."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from diffenc._typing import How
from diffenc.checks.arguments import flag, shown, sides
from diffenc.checks.fields import require_finite
from diffenc.clip.tokens import ClipTokens, to_maps
from diffenc.clip.vision_models import to_image, to_pictures
from diffenc.config import EncoderConfig, check_choice
from diffenc.denoiser.grids import to_grid
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError, ConfigError, OutputError, PromptError
from diffenc.inputs.images import Images, decoded, to_pixel_values
from diffenc.inputs.pictures.resizing import fit
from diffenc.inputs.prompts import PromptEmbeds, match_batch
from diffenc.memory.digests import is_marked, weights_mark
from diffenc.mixing.base import Mixer
from diffenc.mixing.choosing import load_mixer, make_mixer
from diffenc.mixing.config import MIXED, MixingConfig
from diffenc.models import TapInfo
from diffenc.models.base import Backbone
from diffenc.models.device import Device, Dtype
from diffenc.passes.question_tokens import is_there
from diffenc.passes.questions import mean_states
from diffenc.runtime.inference import lasting
from diffenc.storage.names import checked_path, is_folder, reason
from diffenc.storage.pretrained import (
    load_image_processor,
    read_name,
    saved_image_processor,
    stored_name,
)
from diffenc.storage.reading import read_json
from diffenc.storage.schema import make
from diffenc.storage.writing import begin_folder, reporting, write_json
from diffenc.tuning.summary import parameter_table

__all__ = ["FusedEncoder", "How", "View"]

View = Literal["same", "own"]

_APART = ("tokens", "cross_attention")
"""Ways of joining in which each encoder may keep tokens of its own."""
_LAYER = -2
_CONFIG_FILE, _CLIP, _DIFFUSION = "fusion.json", "clip", "diffusion"
_PROCESSOR, _MIXER = "image_processor", "mixer"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Saved:
    """What the config of a saved encoder says; a CLIP without a name lies beside it.

    So does the image processor of one with a name, which may have been another than the model's.
    """

    clip: str | None
    how: How
    layer: int
    grid: int | tuple[int, int] | None
    view: View
    freeze_clip: bool
    clip_mark: tuple[float, ...] | None = None


class FusedEncoder(nn.Module):
    """Tokens of a CLIP (or SigLIP) and of a diffusion encoder that see the same pictures.

    It is called like a `DiffusionEncoder`, and stands in its place before a projector and in a
    `DiffusionVLM`; features, tokens of words and adapters are those of its `diffusion`, which alone
    reads the prompts.
    Every token is `hidden_size` channels wide, first CLIP's, then the diffusion encoder's. With
    "channel" both are filled. With "tokens" and "interleave" a token belongs to one of the two and
    is zero in the channels of the other, so that a plain projector, too, has a first layer of its
    own for each; `diffenc.projector.projector_for` makes the projector that fits.

    The other ways mix the two into one stream with weights of their own, the `mixer`, which trains
    like a projector. A sum has CLIP's width; cross-attention has the tokens and the width of the
    stream that asks.

    Args:
        clip: A `CLIPVisionModel`, `CLIPModel`, `SiglipVisionModel` or `SiglipModel` of
            transformers, a `ClipTokens`, or a name: a folder, a Hub id, or "shapes-clip".
        diffusion: A `DiffusionEncoder`, or a name or a pipeline that
            `DiffusionEncoder.from_pretrained` takes.
        how: Way in which the two are joined. "channel" concatenates the channels of each cell,
            "tokens" sets CLIP's tokens before the others, "interleave" sets a cell's two tokens
            side by side: CLIP's first, cell by cell (MMVP's mixture of features). In
            "cross_attention" one stream's tokens attend to the other's, and training begins from
            the first alone. "add", "weighted" (by one number) and "gated" (CLIP, and the other
            through a gate per channel that begins at zero) are sums; "token_gated" weighs the two
            per token and channel by a gate that reads both, and "question_gated" by one that reads
            the prompt too.
        image_processor: Image processor of a CLIP that is given as an object; None loads it from
            where the object was loaded. A CLIP given by name brings its own.
        layer: Index of the hidden state of CLIP that is read; -2 is the penultimate.
        grid: Side, or (height, width), of the token grid to which both encoders are resampled: by
            means where the grid is coarser, bilinearly where it is finer. None is CLIP's own grid;
            with "tokens" and "cross_attention" it leaves each encoder its own.
        view: Part of a picture that CLIP sees. "same" shows it the part that the diffusion encoder
            sees, so that cells correspond; "own" leaves that to the image processor, which cuts
            CLIP's pictures to a square. Square pictures go to the image processor as they are.
        freeze_clip: Whether CLIP is frozen. Otherwise its weights before `layer` require a
            gradient.
        mixing: Options of the mixer, or a mixer that has them, for values of `how` that mix by
            weights; None is `MixingConfig()`.

    Attributes:
        mixer: Module that mixes the two streams; None with "channel", "tokens" and "interleave".

    Raises:
        ConfigError: An option is not allowed or contradicts a `ClipTokens`, the CLIP is of another
            kind or its grid cannot be matched, the two are on different devices, or the diffusion
            encoder reads several timesteps, which only cross-attention takes in which CLIP asks.
        BackboneError: There is no model of that name.

    Examples:
        >>> encoder = FusedEncoder("shapes-clip", "shapes")
        >>> encoder(picture, "what color is the circle?").shape
        torch.Size([1, 64, 352])

    Source:
        Fusion of CLIP with conditional diffusion features: arXiv:2507.07106, whose draft does not
        say how; table 2 of its later version has concatenation (along which axis is not stated) and
        cross-attention. Interleaving: Tong et al. 2024, "Eyes Wide Shut?" (MMVP), arXiv:2401.06209,
        section 5. The sums and gates by names of VEGA-3D, arXiv:2603.19235, whose
        "instruction_token_gated" is "question_gated" here.
    """

    @lasting
    def __init__(
        self,
        clip: "ClipTokens | nn.Module | str | os.PathLike[str]",
        diffusion: "DiffusionEncoder | str | os.PathLike[str]",
        how: How = "channel",
        *,
        image_processor: Any = None,
        layer: int = _LAYER,
        grid: int | tuple[int, int] | None = None,
        view: View = "same",
        freeze_clip: bool = True,
        mixing: MixingConfig | Mixer | None = None,
    ) -> None:
        super().__init__()
        check_choice("how", how, get_args(How))
        check_choice("view", view, get_args(View))
        freeze_clip = flag("freeze_clip", freeze_clip)
        if isinstance(clip, DiffusionEncoder):
            raise ConfigError(
                "the order is FusedEncoder(clip, diffusion), and a DiffusionEncoder was passed as "
                "clip; exchange the two"
            )
        if grid is not None:
            grid = sides("grid", grid)
        if not isinstance(diffusion, DiffusionEncoder):
            diffusion = DiffusionEncoder.from_pretrained(diffusion)
        if not isinstance(mixing, MixingConfig | Mixer | None):
            raise ConfigError(f"mixing must be a MixingConfig, got {shown(mixing)}")
        options = mixing.config if isinstance(mixing, Mixer) else mixing or MixingConfig()
        options.check_read(how)
        clip_asks = how == "cross_attention" and options.asks == "clip"
        if not isinstance(diffusion.config.timestep, int) and not clip_asks:
            raise ConfigError(
                f"fusion takes one timestep, got {diffusion.config.timestep}; several can be "
                "attended to: how='cross_attention' in which CLIP asks"
            )
        if diffusion.config.tokens != "grid" and how not in _APART:
            raise ConfigError(
                f"how={how!r} joins the streams cell by cell, and tokens="
                f"{diffusion.config.tokens!r} has tokens that are no cells; take "
                'how="tokens" or "cross_attention", or an encoder with tokens="grid"'
            )
        self.clip = _as_clip(clip, diffusion, image_processor, layer, frozen=freeze_clip)
        self.diffusion = diffusion
        self.how, self.view = how, view
        pair = (grid, grid) if isinstance(grid, int) else grid
        self.grid: tuple[int, int] | None = pair or (None if how in _APART else self.clip.grid)
        self.mixer = self._made(mixing, options)
        self._check_devices()

    mixer: Mixer | None

    def _made(self, mixing: MixingConfig | Mixer | None, options: MixingConfig) -> Mixer | None:
        """The mixer of this way, on the device of both models."""
        if self.how not in MIXED:
            if isinstance(mixing, Mixer):
                raise ConfigError(f"how={self.how!r} has no weights, and mixing is a mixer")
            return None
        sizes: dict[str, Any] = {
            "clip_channels": (self.clip.hidden_size,),
            "diffusion_channels": self.diffusion.token_channels,
            "text_width": None,
        }
        if self.how == "question_gated":
            with torch.no_grad():
                empty = self.backbone.embed([""], size=(8, 8))
            sizes["text_width"] = empty.prompt_embeds.shape[2]
        if not isinstance(mixing, Mixer):
            how: Any = self.how
            return make_mixer(how, **sizes, config=options, device=self.clip.device)
        if (mixing.how, mixing.sizes) != (self.how, sizes):
            raise ConfigError(
                f"the mixer is of another encoder: it is for {mixing.how!r} and {mixing.sizes}, "
                f"and here it is {self.how!r} and {sizes}"
            )
        return mixing.to(self.clip.device)

    @classmethod
    @lasting
    def from_pretrained(
        cls,
        folder: "str | os.PathLike[str]",
        *,
        device: Device = None,
        dtype: Dtype = None,
        trainable: bool = False,
        **options: Any,  # of DiffusionEncoder.from_pretrained, which checks their names
    ) -> "FusedEncoder":
        """Inverse of `save_pretrained`.

        Args:
            folder: Folder that `save_pretrained` wrote.
            device: Device of both encoders; None is the CPU.
            dtype: Floating point type of both encoders, or its name; None is float32. The mixer is
                in float32.
            trainable: Whether the mixer goes on training, as do the saved adapter in use and the
                saved captioner of the diffusion encoder.
            options: Further keyword arguments of `DiffusionEncoder.from_pretrained`.

        Raises:
            BackboneError: The folder does not hold a whole fused encoder, or a model is missing.
        """
        source = checked_path("a fused encoder", folder, error=BackboneError)
        try:
            saved: _Saved = make(_Saved, read_json(source / _CONFIG_FILE))
            name = None if saved.clip is None else read_name(saved.clip, source)
        except ConfigError as error:
            raise BackboneError(
                f"{source} does not hold what FusedEncoder.save_pretrained wrote: {error}"
            ) from error
        settings = asdict(saved)
        del settings["clip"], settings["clip_mark"]
        if missing := [
            part
            for part in [_DIFFUSION, *[_CLIP] * (name is None), *[_MIXER] * (saved.how in MIXED)]
            if not is_folder(source / part)
        ]:
            raise BackboneError(f"{source} is not whole: the folder {missing[0]!r} is missing")
        mixer = load_mixer(source / _MIXER) if saved.how in MIXED else None
        diffusion = DiffusionEncoder.from_pretrained(
            source / _DIFFUSION, device=device, dtype=dtype, trainable=trainable, **options
        )
        if name is not None:
            settings["image_processor"] = saved_image_processor(source / _PROCESSOR)
        try:
            fused = cls(name or source / _CLIP, diffusion, mixing=mixer, **settings)
        except ConfigError as error:
            if mixer is None:
                raise
            raise BackboneError(f"the parts of {source} do not go together: {error}") from error
        if mixer is not None:
            mixer.requires_grad_(trainable)
        if name is None:
            fused.clip.name = None  # it has no other place than this folder
        elif saved.clip_mark is not None and not is_marked(fused.clip, saved.clip_mark):
            raise BackboneError(
                f"{name!r} is not the CLIP that {source} was saved with: its weights differ; put "
                "that one back"
            )
        return fused

    def save_pretrained(
        self, folder: "str | os.PathLike[str]", *, include_backbone: bool | None = None
    ) -> None:
        """Write the options, the diffusion encoder's folder, the mixer's, and CLIP.

        A frozen CLIP that was given by its name is saved by that; any other with its weights.

        Args:
            folder: Folder to write to.
            include_backbone: Whether to write the weights of both models, see
                `DiffusionEncoder.save_pretrained`.

        Raises:
            OutputError: The folder cannot be written.
        """
        target = checked_path("a fused encoder", folder, error=OutputError)
        name = self.clip.name if self.clip.frozen and not include_backbone else None
        begin_folder(target, _CONFIG_FILE)
        saved = _Saved(
            clip=None if name is None else stored_name(name, target),
            how=self.how,
            layer=self.clip.layer,
            grid=self.grid,
            view=self.view,
            freeze_clip=self.clip.frozen,
            clip_mark=None if name is None else tuple(weights_mark(self.clip)),
        )
        self.diffusion.save_pretrained(target / _DIFFUSION, include_backbone=include_backbone)
        if self.mixer is not None:
            self.mixer.save_pretrained(target / _MIXER)
        with reporting(target):
            if name is None:
                self.clip.save_pretrained(target / _CLIP)
            else:
                self.clip.image_processor.save_pretrained(target / _PROCESSOR)
        write_json(target / _CONFIG_FILE, asdict(saved))

    @property
    def backbone(self) -> Backbone:
        """Backbone of the diffusion encoder."""
        return self.diffusion.backbone

    @property
    def config(self) -> EncoderConfig:
        """Config of the diffusion encoder."""
        return self.diffusion.config

    @property
    def feature_info(self) -> tuple[TapInfo, ...]:
        """What is read, in the order of the channels where they stand apart: "clip", the taps."""
        reduction = self.clip.image_size // self.clip.side
        return (TapInfo("clip", self.clip.hidden_size, reduction), *self.diffusion.feature_info)

    @property
    def hidden_size(self) -> int:
        """Channels of a token: CLIP's and the diffusion encoder's, or the mixer's."""
        return sum(self.token_channels)

    @property
    def stream_channels(self) -> tuple[int, int]:
        """Channels of CLIP, and of the diffusion encoder."""
        return self.clip.hidden_size, self.diffusion.hidden_size

    @property
    def token_channels(self) -> tuple[int, ...]:
        """Channels of a token that come from CLIP, then from each tap and half; see `Projector`.

        Of a mixed token, the groups that the asking stream has, or all as one.
        """
        if self.mixer is not None:
            return self.mixer.channels
        return (self.clip.hidden_size, *self.diffusion.token_channels)

    @property
    def clip_tokens(self) -> int:
        """How many of the tokens are CLIP's, where a token belongs to one of the two."""
        height, width = self.grid or self.clip.grid
        return height * width

    @property
    def device(self) -> torch.device:
        """Where both models are."""
        return self.diffusion.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the tokens, which is the diffusion encoder's."""
        return self.diffusion.dtype

    def summary(self) -> str:
        """A table to print: parts, their parameters, how many train, and dtypes."""
        parts: dict[str, list[nn.Parameter]] = {"CLIP that is fused": list(self.clip.parameters())}
        if self.mixer is not None:
            parts[f"mixer ({self.how})"] = list(self.mixer.parameters())
        groups = self.diffusion.parameter_groups()
        return parameter_table({**parts, **groups, "all": list(self.parameters())})

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that require a gradient, for an optimizer."""
        return (parameter for _, parameter in self.named_trainable_parameters())

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that require a gradient, with their names in `state_dict`."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def compile(self, **options: Any) -> None:
        """Compile the diffusion encoder's U-Net, see `DiffusionEncoder.compile`."""
        self.diffusion.compile(**options)

    def clear_cache(self) -> None:
        """Forget everything of both encoders; needed after writes through `.data`."""
        self.clip.clear_cache()
        self.diffusion.clear_cache()

    def forward(
        self, images: Images, prompts: str | Sequence[str] | PromptEmbeds | None = None
    ) -> Float[Tensor, "b n c"]:
        """Tokens of pictures under their prompts.

        Args:
            images: Pictures of any kind, see `diffenc.inputs.images.to_pixel_values`.
            prompts: One text for all images or one for each, or texts encoded before; None is
                unconditional.

        Returns:
            Tokens in the dtype and on the device of the diffusion encoder: one per cell of `grid`
            for "channel" and the sums, two for "interleave", CLIP's before the others for "tokens",
            and the asking stream's for "cross_attention".

        Raises:
            DiffencError: As `DiffusionEncoder.extract` and `ClipTokens`.
            ConfigError: The two models are on different devices.
            PromptError: "question_gated" got texts that were encoded before.
        """
        if self.mixer is not None:
            return self._mixed(self.mixer, images, prompts)
        clip, diffusion = self.streams(images, prompts)
        if self.how == "channel":
            return torch.cat([clip, diffusion], dim=-1)
        left, right = self.stream_channels
        clip = nn.functional.pad(clip, (0, right))
        diffusion = nn.functional.pad(diffusion, (left, 0))
        if self.how == "tokens":
            return torch.cat([clip, diffusion], dim=1)
        pairs: Tensor = rearrange([clip, diffusion], "stream b n c -> b (n stream) c")
        return pairs

    encode = forward

    def streams(
        self, images: Images, prompts: str | Sequence[str] | PromptEmbeds | None = None
    ) -> tuple[Float[Tensor, "b _n _c"], Float[Tensor, "b *_t _m _d"]]:
        """CLIP's tokens and the diffusion encoder's, on one grid where `grid` is set.

        The latter have an axis of timesteps where the diffusion encoder reads several.
        """
        images = decoded(images)  # both read them
        clip = self.clip_stream(images)
        return clip, self.diffusion(images, prompts, grid=self.grid)

    def clip_stream(self, images: Images) -> Float[Tensor, "b n c"]:
        """CLIP's tokens alone, as `streams` gives them; the diffusion encoder does not run."""
        self._check_devices()
        shown = [self._shown(picture) for picture in to_pictures(images)]
        clip: Tensor = self.clip(shown, batch_size=self.config.batch_size).to(self.dtype)
        if self.grid is not None and self.grid != self.clip.grid:
            maps = to_grid(to_maps(clip, self.clip.grid), self.grid)
            clip = rearrange(maps, "b c h w -> b (h w) c")
        require_finite(clip, "tokens of CLIP", "load both models in bfloat16 or float32")
        return clip

    def _mixed(
        self,
        mixer: Mixer,
        images: Images,
        prompts: str | Sequence[str] | PromptEmbeds | None,
    ) -> Float[Tensor, "b _n _c"]:
        asks = mixer.text_width is not None
        if asks and isinstance(prompts, PromptEmbeds):
            raise PromptError(
                "how='question_gated' reads texts, and these were encoded before, which does not "
                "tell their tokens from padding; pass the texts themselves"
            )
        if isinstance(prompts, Iterator):
            prompts = list(prompts)  # it is read twice
        clip, diffusion = self.streams(images, prompts)
        text = self._asked(prompts, len(clip)) if asks else None
        if diffusion.ndim > clip.ndim:  # those of all timesteps are attended to
            diffusion = rearrange(diffusion, "b t n c -> b (t n) c")
        there = None if self.config.tokens == "grid" else is_there(diffusion)
        tokens: Tensor = mixer(clip, diffusion, text, there)
        require_finite(tokens, "mixed tokens", "load both models in bfloat16 or float32")
        return tokens

    def _asked(
        self, prompts: str | Sequence[str] | PromptEmbeds | None, batch: int
    ) -> Float[Tensor, "b d"]:
        """The state of each prompt; of "" where the diffusion encoder reads none."""
        config = self.config
        unread = prompts is None or config.conditioning == "uncond"
        texts = [""] if unread else match_batch(prompts, batch)  # type: ignore[arg-type]
        distinct = list(dict.fromkeys(texts))
        size = config.size or self.backbone.default_size
        with self.backbone.lock:
            states = mean_states(
                self.backbone,
                distinct,
                size=(size, size) if isinstance(size, int) else size,
                long_prompts=config.long_prompts,
                use_cache=self.diffusion.use_cache,
            )
        rows = [distinct.index(text) for text in texts]
        return states[rows].expand(batch, -1)

    def _shown(self, picture: Image.Image) -> Image.Image:
        """What CLIP's image processor gets."""
        if self.view == "own":
            return picture
        size, rule = self.config.size or self.backbone.default_size, self.config.resize
        height, width = (size, size) if isinstance(size, int) else size
        framed = None
        square = picture.height == picture.width
        if rule in ("crop", "pad") and picture.height * width != picture.width * height:
            framed = to_pixel_values(picture, size=(height, width), resize=rule, multiple=1)[0]
            square = height == width
        if square:
            return picture if framed is None else to_image(framed)
        if framed is None:
            framed = to_pixel_values(picture, size=None, resize="none", multiple=1)[0]
        side = self.clip.image_size
        return to_image(fit(framed, (side, side), "squash"))

    def _check_devices(self) -> None:
        if self.clip.device != self.diffusion.device:
            raise ConfigError(
                f"CLIP is on {self.clip.device} and the diffusion encoder on "
                f"{self.diffusion.device}; move both with `.to(device)`"
            )
        if self.mixer is not None and next(self.mixer.parameters()).device != self.clip.device:
            raise ConfigError(
                f"CLIP and the diffusion encoder are on {self.clip.device}, and the mixer is not; "
                "move the whole fused encoder with `.to(device)`"
            )


def _as_clip(
    clip: "ClipTokens | nn.Module | str | os.PathLike[str]",
    diffusion: DiffusionEncoder,
    image_processor: Any,
    layer: int,
    *,
    frozen: bool,
) -> ClipTokens:
    options: dict[str, Any] = {
        "layer": layer,
        "frozen": frozen,
        "use_cache": diffusion.use_cache,
    }
    if isinstance(clip, ClipTokens):
        _check_own(clip, image_processor, layer, frozen=frozen)
        return clip
    if isinstance(clip, str | os.PathLike):
        return ClipTokens.from_pretrained(
            clip,
            image_processor=image_processor,
            device=diffusion.device,
            dtype=diffusion.dtype,
            **options,
        )
    if image_processor is None:
        image_processor = _processor_of(clip)
    return ClipTokens(clip, image_processor, **options)


def _check_own(clip: ClipTokens, image_processor: Any, layer: int, *, frozen: bool) -> None:
    """Raise a `ConfigError` where an option contradicts a `ClipTokens`, which has its own."""
    others = image_processor is not None and image_processor is not clip.image_processor
    for name, contradicts in (
        ("image_processor", others),
        ("layer", layer not in (_LAYER, clip.layer)),
        ("freeze_clip", not frozen and clip.frozen),
    ):
        if contradicts:
            raise ConfigError(
                f"a ClipTokens has its own {name}, and another one is passed beside it; make the "
                "ClipTokens with it, or pass the model itself"
            )


def _processor_of(clip: nn.Module) -> Any:
    origin = getattr(clip, "name_or_path", "")
    try:
        if not origin:
            raise OSError("it was loaded from nowhere")
        return load_image_processor(origin)
    except Exception as error:  # missing, offline, broken: each in words of its own
        raise ConfigError(
            f"the image processor of this CLIP is not known ({reason(error)}); pass "
            "image_processor=CLIPImageProcessor.from_pretrained(...), the one it was trained with"
        ) from error
