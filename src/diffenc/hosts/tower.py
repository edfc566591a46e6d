"""A diffusion model in the place of a CLIP vision tower."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffenc.checks.fields import require_finite
from diffenc.errors import BackboneError, ConfigError, ImageError, ShapeError
from diffenc.hosts.adapter import Adapter, load_state, save_adapter
from diffenc.hosts.checkpoints import find_adapter
from diffenc.hosts.first_call import first_call_to_record
from diffenc.hosts.hidden import Conversion, HiddenEncoder
from diffenc.hosts.loading import (
    builds_on_meta,
    is_host_config,
    load_encoder,
    read_device_map,
)
from diffenc.hosts.prompts import (
    Prompts,
    PromptTokenizer,
    PromptTokens,
    embed_tokens,
    resolve_prompts,
    words_of_tokens,
)
from diffenc.hosts.spec import DTYPES, TowerSpec
from diffenc.hosts.tower_config import TowerConfig
from diffenc.passes.encoded import prompts_of
from diffenc.passes.word_tokens import Spans
from diffenc.runtime.threads import lock_of


class DiffusionVisionTower(nn.Module):
    """Vision tower with the contract of LLaVA and its kin.

    The frozen diffusion model is hidden from the host: it is in no list of modules, parameters or
    weights, and follows the tower's moves and casts. Only the adapter that a spec with a rank asks
    for is registered, as `adapter.<i>_down` and `adapter.<i>_up`. Everything that hosts read
    before weights are loaded follows from the spec.

    The prompt of an image is what is passed, else that of the `prompt_scope` around the call, else
    the spec's null prompt.

    Args:
        name: Spec of the tower, such as ``"diffenc:sdxl?t=50&rank=16"``; see `TowerSpec.parse`.
        args: Arguments that the host passes: any object. Its `mm_vision_select_layer`,
            `mm_vision_select_feature` and `unfreeze_mm_vision_tower` are kept for the host to read.
        delay_load: Whether to wait for `load_model`. In any case nothing is loaded while a host's
            own model is under construction: the host's call of `load_model`, or the first call of
            the tower, does it.
        vision_tower_cfg: Another name of `args`.
        spec: Parsed spec, in place of `name`; None parses `name`.
        ignored: Further arguments that hosts pass; ignored.

    Raises:
        ConfigError: The spec does not parse.
        TapError: The model has no such tap.

    Examples:
        >>> tower = DiffusionVisionTower("diffenc:shapes?t=50")
        >>> tower.hidden_size, tower.num_patches
        (224, 64)
        >>> pixel_values = tower.image_processor(picture, return_tensors="pt")["pixel_values"]
        >>> tower(pixel_values, ["what color is the circle?"]).shape
        torch.Size([1, 64, 224])
    """

    def __init__(
        self,
        name: str | None = None,
        args: Any = None,
        delay_load: bool = False,
        *,
        vision_tower_cfg: Any = None,
        spec: TowerSpec | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if (name is None) == (spec is None):
            raise ConfigError("pass a tower's name, 'diffenc:<model>?...', or spec=, one of them")
        self.spec = TowerSpec.parse(name) if name is not None else spec  # type: ignore[assignment]
        self.vision_tower_name = str(self.spec) if name is None else name
        self.args = vision_tower_cfg if args is None else args
        self.select_layer = getattr(self.args, "mm_vision_select_layer", -1)
        self.select_feature = getattr(self.args, "mm_vision_select_feature", "patch")
        self.unfreeze_mm_vision_tower = getattr(self.args, "unfreeze_mm_vision_tower", False)
        self.delay_load = delay_load
        self.gradient_checkpointing = False
        self.adapter = Adapter.of_spec(self.spec)
        self._hidden = HiddenEncoder(DTYPES.get(self.spec.dtype or ""))
        self._tokenizer = PromptTokenizer(self.spec.model)
        self._told_of_null = self._told_of_frozen_adapter = False
        if not (delay_load or is_host_config(self.args) or builds_on_meta()):
            self.load_model()

    # What hosts read, loaded or not

    spec: TowerSpec

    @property
    def is_loaded(self) -> bool:
        """Whether the frozen model is there."""
        return self._hidden.is_loaded

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""
        return self.spec.hidden_size

    @property
    def image_size(self) -> int:
        """Side of the images that are taken, in pixels."""
        return self.spec.image_size

    @property
    def patch_size(self) -> int:
        """Pixels per token and side."""
        return self.spec.patch_size

    @property
    def num_patches(self) -> int:
        """Tokens of an image."""
        return self.spec.num_patches

    @property
    def num_patches_per_side(self) -> int:
        """Side of the square of tokens."""
        return self.spec.num_patches_per_side

    @cached_property
    def config(self) -> TowerConfig:
        """Sizes, as hosts look them up."""
        return TowerConfig(self.spec)

    @property
    def cfg_only(self) -> TowerConfig:
        """The config, by the name that it has in LLaVA's tower before loading."""
        return self.config

    @cached_property
    def image_processor(self) -> Any:
        """Makes the tower's input of pictures, see `TowerImageProcessor`."""
        from diffenc.hosts.image_processor import TowerImageProcessor

        return TowerImageProcessor(self.image_size)

    @property
    def vision_tower(self) -> "DiffusionVisionTower":
        """The model inside, for hosts that reach for its config, dtype or parameters: the tower."""
        return self

    vision_model = vision_tower

    @property
    def device(self) -> torch.device:
        """Where the model is, or will be loaded."""
        return self._hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type that the model computes in, or will once it is loaded."""
        return self._hidden.dtype

    @property
    def dummy_feature(self) -> Float[Tensor, "1 c"]:
        """One token of zeros."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def encoder(self) -> Any:
        """The frozen encoder; None as long as it is not loaded."""
        return self._hidden.encoder

    # Weights

    def load_model(self, device_map: Any = None, **ignored: Any) -> None:
        """Load the frozen model; a second call does nothing.

        An adapter that was frozen before stays frozen.

        Args:
            device_map: Device, "auto", or a mapping of module names to devices; None leaves the
                tower where it is.
            ignored: Further arguments that hosts pass; ignored.

        Raises:
            BackboneError: The model cannot be had.
            ConfigError: No such device, or the options do not fit the model.
        """
        with lock_of(self):
            if not (self.is_loaded or builds_on_meta()):
                self._load(device_map)

    def _load(self, device_map: Any) -> None:
        hidden = self._hidden
        hidden.device = read_device_map(device_map, hidden.device)
        encoder = load_encoder(self.spec, device=hidden.device, dtype=hidden.dtype)
        if self.adapter is not None:
            self._check_adapter()
            if device_map is not None:
                self.adapter.to(hidden.device)
            self.adapter.inject(encoder.backbone.denoiser)
        hidden.put(encoder)
        self._tokenizer = PromptTokenizer(self.spec.model)

    def _check_adapter(self) -> None:
        assert self.adapter is not None
        if problem := self.adapter.problem():
            self.adapter.reset()
            self.adapter.to(self._hidden.device)
            warnings.warn(
                f"the checkpoint had no adapter for this tower ({problem}): it starts as a new "
                "one, which changes nothing. Load a trained one with load_adapter(folder).",
                stacklevel=4,
            )
        self.adapter.keep_precise()

    def save_adapter(self, folder: "str | os.PathLike[str]") -> Path:
        """Write the adapter to `diffenc_adapter.safetensors` in a folder.

        Raises:
            ConfigError: The spec has no rank.
            OutputError: The folder cannot be written.
        """
        return save_adapter(self._require_adapter(), self.spec, folder)

    def load_adapter(self, source: "str | os.PathLike[str]") -> bool:
        """Take the adapter from a file or a host's checkpoint folder, under whatever prefix.

        Args:
            source: A side file, a folder with one, or one with the host's own weights.

        Returns:
            Whether an adapter was found.

        Raises:
            BackboneError: There is no such file or folder, or it cannot be read.
            ConfigError: It is the adapter of another spec, or this spec has no rank.
        """
        adapter = self._require_adapter()
        folder = find_adapter(source, self.spec)
        if folder is None:
            return False
        if adapter.problem():
            adapter.reset()
            adapter.to(self._hidden.device)
        load_state(adapter, folder[1], folder[0])
        if self.is_loaded:
            self.encoder.clear_cache()
        return True

    def _require_adapter(self) -> Adapter:
        if self.adapter is None:
            raise ConfigError(f"{str(self.spec)!r} has no adapter; add rank=16, for one, to it")
        return self.adapter

    def _apply(self, fn: Conversion, recurse: bool = True) -> "DiffusionVisionTower":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._hidden.follow(fn)
        return self

    # Features

    def tokenize(self, prompts: Prompts) -> PromptTokens:
        """Texts to the tensors that `forward` takes; no weights are needed."""
        return self._tokenizer(prompts)

    @property
    def tokenizer(self) -> PromptTokenizer:
        """What `tokenize` calls; it may go to the processes that load data."""
        return self._tokenizer

    def feature_select(self, features: Tensor) -> Tensor:
        """The features themselves: there is no class token to take away."""
        return features

    def forward(
        self,
        images: "Float[Tensor, 'n 3 h w'] | Float[Tensor, '3 h w'] | Sequence[Tensor]",
        prompts: Prompts | None = None,
        **ignored: Any,
    ) -> "Float[Tensor, 'n t c'] | list[Tensor]":
        """Tokens of images.

        Args:
            images: RGB squares of `image_size` in [-1, 1], in any floating dtype and on any
                device; a list of such, or of batches of them, gives a list.
            prompts: Prompts, one for all images or one each, tiles counted one by one.
            ignored: Further arguments that hosts pass; ignored.

        Returns:
            Tokens, row by row, in the dtype and on the device of `images`.

        Raises:
            ShapeError: Images of another shape.
            ImageError: Values outside [-1, 1], or no floats.
            PromptError: The number of prompts fits the images in no way.
            ConfigError: The host's way of running several devices splits the adapter.
        """
        if (call := first_call_to_record()) is not None:
            call.stop_at(images)
        if isinstance(images, (list, tuple)):
            return self._list_features(images, prompts)
        pixel_values = self._check(images)
        tokens = resolve_prompts(prompts, len(pixel_values), self._tokenizer)
        return self._features(pixel_values, tokens)

    def _list_features(self, images: Sequence[Tensor], prompts: Prompts | None) -> list[Tensor]:
        parts = [self._check(part) for part in images]
        if not parts:
            return []
        first, counts = parts[0], [len(part) for part in parts]
        tokens = resolve_prompts(prompts, sum(counts), self._tokenizer)
        joined = torch.cat([part.to(first.device, torch.float32) for part in parts])
        features = self._features(joined, tokens).split(counts)
        return [
            each.to(part.device, part.dtype).contiguous()
            for each, part in zip(features, parts, strict=True)
        ]

    def _features(
        self, pixel_values: Float[Tensor, "n 3 h w"], tokens: PromptTokens | None
    ) -> Float[Tensor, "n t c"]:
        with lock_of(self):
            self._make_ready()
            if not len(pixel_values):
                return pixel_values.new_zeros(0, self.num_patches, self.hidden_size)
            shown = pixel_values.to(self.device, torch.float32)
            # A host's autocast would bring VAE and noise to half precision.
            with torch.autocast(self.device.type, enabled=False), self.encoder.backbone.lock:
                features: Tensor = self._read(shown, self._embeds(tokens, len(shown)))
        features = features.to(pixel_values.device, pixel_values.dtype).contiguous()
        require_finite(features, "tokens of the tower", "pass images in bfloat16 or float32")
        return features

    def _read(self, shown: Tensor, embeds: Any) -> Tensor:
        """The encoder's tokens; what it would warn of, the tower has told in a host's words."""
        if hasattr(self.encoder, "tokens_and_features"):
            tokens: Tensor = self.encoder.tokens_and_features(shown, embeds)[0]
            return tokens
        fused: Tensor = self.encoder(shown, embeds)
        return fused

    def _embeds(self, tokens: PromptTokens | None, images: int) -> Any:
        """What the encoder is given: embeddings, or None for the unconditional text alone."""
        if tokens is None:
            self._tell_of_null()
            tokens = self.tokenize(self.spec.null).rows(images) if self.spec.null else None
        diffusion = getattr(self.encoder, "diffusion", self.encoder)
        options: dict[str, Any] = {
            "size": (self.image_size, self.image_size),
            "uncond": self.spec.uncond,
            "use_cache": diffusion.use_cache,
        }
        if tokens is not None and not self._is_unconditional(tokens):
            embeds = embed_tokens(self.encoder.backbone, tokens, **options)
            return replace(embeds, words=self._words(tokens))
        if self.spec.conditioning in (None, "uncond"):
            return None
        return replace(prompts_of(self.encoder.backbone, [None], **options), words=({},))

    def _words(self, tokens: PromptTokens) -> "tuple[Spans, ...] | None":
        """Words of the prompts, for a tower that gives tokens of words."""
        if self.spec.tokens == "grid":
            return None
        return words_of_tokens(self.encoder.backbone.tokenizers[0], tokens)

    def _is_unconditional(self, tokens: PromptTokens) -> bool:
        """Whether the encoder may be given nothing, and look up what it knows of the pictures."""
        return all(tokens.is_unconditional(self.encoder.backbone, self.spec.uncond))

    def _tell_of_null(self) -> None:
        words = self.spec.tokens != "grid"
        if (self.spec.prompted or words) and not self._told_of_null:
            self._told_of_null = True
            why = (
                f"this tower's tokens are of a prompt's words (tokens={self.spec.tokens}) and it "
                "was called without one: all but the last of them are zeros"
                if words and not self.spec.null
                else "this tower was trained with prompts (prompted=1) and was called without; it "
                "reads the null prompt"
            )
            warnings.warn(
                f"{why}. Pass prompts, open diffenc.hosts.prompts.prompt_scope, or let "
                "the host's model take them (diffenc.hosts.llava.take_prompts).",
                stacklevel=5,
            )

    def _tell_of_frozen_adapter(self) -> None:
        assert self.adapter is not None
        if self._told_of_frozen_adapter or not self.training:
            return
        self._told_of_frozen_adapter = True
        if not any(parameter.requires_grad for parameter in self.adapter.parameters()):
            warnings.warn(
                f"{str(self.spec)!r} has an adapter of rank {self.spec.rank}, and this training "
                "step gives it no gradient: the host froze the tower. In a first stage that trains "
                "the projector alone that is right. Where the adapter should train, unfreeze it "
                "before the optimizer is made: tower.adapter.requires_grad_(True), or the host's "
                "own option (LLaVA-NeXT: mm_tunable_parts with mm_vision_tower; peft: "
                "modules_to_save with 'adapter').",
                stacklevel=5,
            )

    def _check(self, images: Any) -> Float[Tensor, "n 3 h w"]:
        side = self.image_size
        if not isinstance(images, Tensor) or images.ndim not in (3, 4):
            raise ShapeError(
                f"a tower takes tensors (n, 3, {side}, {side}), or a list of them, got "
                f"{tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__}"
            )
        images = images[None] if images.ndim == 3 else images
        if tuple(images.shape[1:]) != (3, side, side):
            raise ShapeError(
                f"this tower takes images of (3, {side}, {side}), got {tuple(images.shape[1:])}; "
                "use its own image_processor, or put the size into its spec: size="
                f"{images.shape[-1]}"
            )
        if not images.is_floating_point():
            raise ImageError(f"images must be floats in [-1, 1], got {images.dtype}")
        checked: Tensor = images
        return checked

    def _make_ready(self) -> None:
        if not self.is_loaded:
            self.load_model()
        if not self.is_loaded:
            raise BackboneError(
                "the tower cannot load its model while the host is built on the meta device; call "
                "load_model() afterwards"
            )
        if getattr(self, "_is_replica", False) and self.adapter is not None:
            raise ConfigError(
                "torch.nn.DataParallel splits the adapter from the model that runs it; start one "
                "process per GPU (torchrun), or show one GPU only (CUDA_VISIBLE_DEVICES=0)"
            )
        unet: Any = self.encoder.backbone.denoiser
        if self.adapter is not None:
            self.adapter.keep_precise()
            self._tell_of_frozen_adapter()
            if self.adapter.link(unet):
                self.encoder.clear_cache()
        if self.gradient_checkpointing != unet.is_gradient_checkpointing:
            enable, disable = (
                unet.enable_gradient_checkpointing,
                unet.disable_gradient_checkpointing,
            )
            (enable if self.gradient_checkpointing else disable)()

    def extra_repr(self) -> str:
        """The spec, for `repr`."""
        return f"{self.vision_tower_name!r}, loaded={self.is_loaded}"
