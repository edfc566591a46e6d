"""A diffusion model as a vision model of transformers."""

import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError, ConfigError, PromptError, near_matches
from diffenc.hosts.adapter import Adapter
from diffenc.hosts.loading import load_encoder
from diffenc.hosts.prompts import Prompts, PromptTokens, like_a_prompt
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.hosts.transformers.configuration import INSIDE, DiffEncConfig, check_inside
from diffenc.hosts.transformers.inside import (
    build_backbone,
    check_marks,
    count_tokens,
    count_weights,
    empty_ids,
    hide_adapter,
    mark,
    show_adapter,
    store_tokens,
)
from diffenc.models.sources import lasting_source

_PROMPT_ARGUMENTS = ("prompt_input_ids", "prompt_attention_mask", "prompts")


class DiffEncModel(PreTrainedModel):  # type: ignore[misc]  # transformers is seen as Any
    """Vision tower for LLaVA and other models of transformers.

    The frozen diffusion model is no part of the module tree, unless the config says so: it is
    loaded by its name with the first call or by `load_backbone`, follows the model's device and
    dtype, and is in no checkpoint. What a spec with a rank trains is registered and saved.

    The prompt of an image is what `forward` is given, else that of the
    `diffenc.hosts.prompts.prompt_scope` around the call, else the spec's null prompt.

    Args:
        config: Config of the tower, a `DiffEncConfig`.

    Attributes:
        tower: The tower that does the work; it holds the adapter.
        backbone: Diffusion model where it is part of the checkpoint; otherwise None.

    Examples:
        >>> from diffenc.hosts.transformers import DiffEncImageProcessor
        >>> model = DiffEncModel(DiffEncConfig("diffenc:shapes?t=50"))
        >>> pixel_values = DiffEncImageProcessor(64)(picture, return_tensors="pt")["pixel_values"]
        >>> model(pixel_values, prompts=["what color is the circle?"]).last_hidden_state.shape
        torch.Size([1, 64, 224])
    """

    config_class = DiffEncConfig
    base_model_prefix = "diffenc"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DiffEncModel"]  # noqa: RUF012  # transformers' own way

    def __init__(self, config: DiffEncConfig) -> None:
        super().__init__(config)
        # Follows the host's moves and casts also where these assign instead of converting. It is
        # saved, so that a checkpoint that refers to all else holds something, and comes first:
        # transformers 4.48 compares the dtype of the first weight with the model's.
        self.register_buffer("place", torch.zeros(1))
        self.tower = DiffusionVisionTower(spec=config.tower_spec, delay_load=True)
        self.gradient_checkpointing = False
        self._is_checked = False
        self._followed: tuple[torch.device, torch.dtype] | None = None
        self.backbone: Any = None
        if config.inside:
            self._register(build_backbone(config))
            self._keep_in_fp32_modules = ["vae"]  # in float16 SDXL's overflows
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Nothing: adapters are made with their values, backbones are loaded."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        place: Tensor = self.place
        return self.tower.device if place.is_meta else place.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the features."""
        place: Tensor = self.place
        return place.dtype

    @property
    def patch_size(self) -> int:
        """Pixels per token and side."""
        return int(self.config.patch_size)

    # Weights

    def load_backbone(self, source: str | None = None) -> None:
        """Load the frozen diffusion model; without `source`, a second call does nothing.

        Args:
            source: Alias, Hub id or folder of a model with the same configs; None is the config's.

        Raises:
            BackboneError: It cannot be had, or has other configs.
            ConfigError: The model still lies on the meta device.
        """
        if source is not None and not self.config.inside:
            if self.tower.is_loaded:
                raise ConfigError(
                    "the backbone is loaded already; give its source before the first call"
                )
            self.config.backbone_source = lasting_source(source)
            self.tower.spec = self.config.tower_spec
        self._require_memory()
        with ExitStack() as stack:
            # Weights of inference mode could never take part in training.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            if not self.config.inside:
                self._follow()
                self._load_hidden()
            elif source is not None or not self._is_checked:
                self._fill(source)

    def _require_memory(self) -> None:
        if self.place.is_meta or any(weight.is_meta for weight in self.parameters()):
            raise ConfigError(
                "weights of the tower lie on the meta device. Either the model was built there: "
                "load a checkpoint, or call to_empty(device=...) and load_backbone(). Or a "
                "device_map offloads the tower: give it a device, {'model.vision_tower': 0, ...}"
            )

    def _load_hidden(self) -> None:
        """Load the tower's model; what the host froze stays frozen."""
        adapter = self.tower.adapter
        weights = [] if adapter is None else list(adapter.parameters())
        trained = [weight.requires_grad for weight in weights]
        self.tower.load_model()
        for weight, was in zip(weights, trained, strict=True):
            weight.requires_grad_(was)

    def _fill(self, source: str | None) -> None:
        """Copy weights of a source into the registered backbone."""
        spec = self.config.tower_spec
        spec = spec if source is None else replace(spec, model=source)
        encoder = load_encoder(spec, device=torch.device("cpu"), dtype=torch.float32)
        backbone = encoder.backbone
        state = dict(backbone.state_dict())
        show_adapter(state, "", self.backbone)
        try:
            self.backbone.load_state_dict(state)
        except RuntimeError as error:
            raise BackboneError(
                f"{spec.model!r} has other weights than the config tells: {error}"
            ) from error
        self._note(backbone)
        self.backbone.clear_caches()

    def include_backbone(self) -> None:
        """Make the loaded diffusion model part of the checkpoint.

        A host that copies its config when it builds keeps its own: there, give
        ``backbone_source="checkpoint"`` to the config from the start, and call `load_backbone`.

        Raises:
            ConfigError: The spec joins a second encoder, or has tokens of words.
            BackboneError: The model cannot be had.
        """
        if self.config.inside:
            return
        check_inside(self.config.tower_spec)
        self.load_backbone()
        self.config.backbone_source = INSIDE
        self._register(self.tower.encoder.backbone)
        self._note(self.backbone)
        self._is_checked = True

    def _note(self, backbone: Any) -> None:
        """Write down what a checkpoint needs beside weights, from a backbone with tokenizers."""
        if self.tower.spec.uncond is None and backbone.uncond_rule != self.backbone.uncond_rule:
            raise ConfigError(
                f"{backbone.name!r} has a rule of its own for no prompt, which no config tells; "
                f"add uncond={backbone.uncond_rule} to the spec"
            )
        self.backbone_marks.copy_(mark(self.backbone))
        self.backbone_empty_ids.copy_(empty_ids(backbone, self.tower.spec.null))

    def _register(self, backbone: Any) -> None:
        """Make a backbone a submodule, after the tower: its adapter then has neutral names only."""
        self.backbone = backbone
        marks = torch.zeros(count_weights(backbone), dtype=torch.int32)
        self.register_buffer("backbone_marks", marks)
        shape = count_tokens(backbone)
        self.register_buffer("backbone_empty_ids", torch.zeros(shape, dtype=torch.long))
        self._is_frozen = backbone.device.type != "meta"
        self._register_state_dict_hook(_hide)
        self.register_load_state_dict_pre_hook(_show)

    def _attach(self) -> None:
        """Bring a registered backbone into the tower, once its weights are there."""
        if self._is_checked and self.tower.is_loaded:
            return
        check_marks(self.backbone, self.backbone_marks)
        self._is_checked = True
        if self.tower.is_loaded:
            return
        store_tokens(self.backbone, self.tower.spec.null, self.backbone_empty_ids)
        encoder = DiffusionEncoder(self.backbone, self.tower.spec.encoder_config())
        if self.tower.adapter is not None:
            self.tower.adapter.inject(self.backbone.denoiser)
        self.tower._hidden.put(encoder)

    def _follow(self) -> None:
        """Bring what is hidden to where the host brought this model."""
        place = self.place
        if place.is_meta or (place.device, place.dtype) == self._followed:
            return
        self.tower._hidden.follow(lambda tensor: tensor.to(place.device, place.dtype))
        self._followed = place.device, place.dtype

    def train(self, mode: bool = True) -> "DiffEncModel":
        """Training mode for what is trained; the frozen model stays in evaluation mode."""
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
            if not self._is_frozen:  # loading makes every weight one that is trained
                self._is_frozen = True
                self.backbone.requires_grad_(False)
        if self.tower.adapter is not None:  # hosts call this when they have loaded
            _mend(self.tower.adapter)
        return self

    # Features

    def forward(
        self,
        pixel_values: Float[Tensor, "n 3 h w"] | None = None,
        prompt_input_ids: Int[Tensor, "m l"] | None = None,
        prompt_attention_mask: Int[Tensor, "m l"] | None = None,
        prompts: Prompts | None = None,
        output_hidden_states: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> "BaseModelOutputWithPooling | tuple[Any, ...]":
        """Tokens of images.

        Args:
            pixel_values: RGB squares of `config.image_size` in [-1, 1].
            prompt_input_ids: Tokenized prompts, one row for all images or one each.
            prompt_attention_mask: Mask that is 1 for a prompt's own tokens and 0 for padding.
            prompts: Prompts as texts, in place of tokens.
            output_hidden_states: Any value: `hidden_states` is always given.
            return_dict: Whether to return a mapping; False gives a tuple.
            kwargs: Further arguments that hosts pass; ignored.

        Returns:
            `last_hidden_state` (n tokens channels); `hidden_states`, whose every entry is the
            same, so that any index of a layer is right: which layers are read is said by the
            spec's taps; `pooler_output`, the mean over tokens.

        Raises:
            ShapeError: Images of another shape.
            ImageError: Values outside [-1, 1], or no floats.
            PromptError: Tokens without mask, or a number of prompts that fits the images in no way.
            BackboneError: The backbone's weights cannot be had, or the checkpoint lacked them.
        """
        if pixel_values is None:
            raise ConfigError("pixel_values are needed; DiffEncImageProcessor makes them")
        explicit = _explicit(prompt_input_ids, prompt_attention_mask, prompts, kwargs)
        self._require_memory()
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                # What is cached must not be an inference tensor: training may meet it later.
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                pixel_values = pixel_values.clone()
            self._follow()
            if self.config.inside:
                self._attach()
            elif not self.tower.is_loaded:
                self.load_backbone()
            self.tower.gradient_checkpointing = self.gradient_checkpointing
            tokens = self.tower(pixel_values, explicit)
        target = pixel_values if self.place.is_meta else self.place
        tokens = tokens.to(target.device, target.dtype)
        states = (tokens,) * (self.config.num_hidden_layers + 1)
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=tokens.mean(dim=1), hidden_states=states
        )
        return output if return_dict is not False else output.to_tuple()


def _explicit(
    ids: Tensor | None, mask: Tensor | None, prompts: Prompts | None, others: dict[str, Any]
) -> Prompts | None:
    """The prompts that a call was given, or None."""
    if strange := [name for name in others if like_a_prompt(name)]:
        hint = near_matches(strange[0], _PROMPT_ARGUMENTS)
        raise PromptError(
            f"unknown argument {strange[0]!r}.{hint} Prompts are passed as prompt_input_ids and "
            "prompt_attention_mask, or as prompts"
        )
    if ids is None and mask is None:
        return prompts
    if ids is None or mask is None:
        raise PromptError("prompt_input_ids and prompt_attention_mask go together; got one of them")
    if prompts is not None:
        raise PromptError("pass prompts as texts or as tokens, not both")
    return PromptTokens(ids, mask)


def _mend(adapter: Adapter) -> None:
    """Give an adapter that no checkpoint had the weights of a new one.

    In place: an optimizer may hold them.
    """
    if any(weight.is_meta or not weight.numel() for weight in adapter.parameters()):
        return
    adapter.keep_precise()
    if problem := adapter.problem():
        fresh = Adapter(adapter.layers, rank=adapter.rank, alpha=adapter.alpha, seed=adapter.seed)
        with torch.no_grad():
            for weight, new in zip(adapter.parameters(), fresh.parameters(), strict=True):
                weight.copy_(new)
        warnings.warn(
            f"the checkpoint had no adapter for this tower ({problem}): it starts as a new one, "
            "which changes nothing",
            stacklevel=3,
        )


def _hide(module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Write a backbone under the names that it has without LoRA."""
    hide_adapter(state, f"{prefix}backbone.")
    if module._is_checked:  # it may have been trained
        state[f"{prefix}backbone_marks"] = mark(module.backbone).to(module.backbone_marks.device)


def _show(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    show_adapter(state, f"{prefix}backbone.", module.backbone)
