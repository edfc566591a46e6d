"""The parts of a model at real size without their weights: parameters, tokens, arithmetic."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffenc.clip.captioner import ImplicitCaptioner
from diffenc.clip.tokens import ClipTokens
from diffenc.denoiser.shortening import shortened
from diffenc.denoiser.transformers import layout_of
from diffenc.errors import BackboneError, ConfigError, DiffencError
from diffenc.mixing.choosing import make_mixer
from diffenc.mixing.config import MIXED
from diffenc.mllm.training.config import ModelConfig
from diffenc.mllm.training.sharding import layers_of
from diffenc.mllm.vision import middle_cells, processed_side
from diffenc.models import describe
from diffenc.models.building import build_on_meta
from diffenc.models.denoisers import config_of, meta_inputs
from diffenc.models.family_files import FAMILY_FILES
from diffenc.models.reached_layers import reached_projections
from diffenc.passes.question_tokens import token_channels, token_count
from diffenc.storage.names import reason
from diffenc.storage.pretrained import load_image_processor, model_config

_LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_LLAMA_13B = {
    **_LLAMA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
_LANGUAGE_MODELS = {"lmsys/vicuna-7b-v1.5": _LLAMA_7B, "lmsys/vicuna-13b-v1.5": _LLAMA_13B}
_VIT_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_VISION_MODELS = {
    "openai/clip-vit-large-patch14-336": _VIT_L,
    "openai/clip-vit-large-patch14": {**_VIT_L, "image_size": 224},
    "facebook/dinov2-large": {
        "model_type": "dinov2",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 518,
        "patch_size": 14,
    },
}
_CLIP_TEXT = 124_436_737
"""Parameters of the text half of CLIP ViT-L and of both projections, which its files hold too."""
_SHOWN_AT = {"facebook/dinov2-large": 224}
"""Sides of the pictures that image processors make, where they differ from the config's size."""


@dataclass(slots=True)
class MetaEncoder:
    """An encoder of pictures.

    Attributes:
        parameters: Numbers of parameters of the frozen parts, by name.
        trained: Numbers of parameters of the parts that train, by name.
        flops: Floating-point operations for one picture under one prompt, by part.
        tokens: Number of tokens of a picture.
        hidden_size: Number of channels of a token.
        groups: Channel counts of the groups that a layer norm before the projector normalises
            together.
        pixels: Number of pixels of a picture, as the first part sees it.
        text_width: Number of channels of a text state.
        stored: Numbers of parameters in the files of each model, by its name.
        denoiser: Name of the part that features are read from: "unet" or "transformer".
    """

    parameters: dict[str, int] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    hidden_size: int = 0
    groups: tuple[int, ...] = ()
    pixels: int = 0
    text_width: int = 0
    stored: dict[str, int] = field(default_factory=dict)
    denoiser: str = "unet"


@dataclass(frozen=True, slots=True)
class MetaLanguageModel:
    """A causal language model.

    Attributes:
        parameters: Number of all parameters.
        computing: Number of the parameters that each token is multiplied by: those of the
            embeddings are left out unless the output layer shares them.
        width: Number of channels of a token.
        layers: Number of layers.
        vocabulary: Number of entries of the vocabulary.
        context: Number of tokens that the context holds; None where the config does not say.
        lora: Number of parameters of a LoRA per rank: the sum of the input and output widths of the
            linear layers, without the output layer.
        in_layers: Number of parameters of all layers.
        largest_layer: Number of parameters of the largest layer.
        stored_width: Bytes of a number in the model's files.
    """

    parameters: int
    computing: int
    width: int
    layers: int
    vocabulary: int
    context: int | None
    lora: int
    in_layers: int
    largest_layer: int
    stored_width: int


def meta_language_model(name: str) -> MetaLanguageModel:
    """Built on the meta device of its config, or of a bundled one of the known models.

    Raises:
        BackboneError: Its config cannot be had.
    """
    from transformers import AutoModelForCausalLM

    config = _config(name, _LANGUAGE_MODELS, "language model")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    inner = [
        module for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    ]
    total = count(model)
    layers = [count(layer) for layer in layers_of(model)] or [0]
    stored: Any = getattr(config, "dtype", None) or torch.float16  # as most are
    tied = head is not None and head.weight is embedding
    return MetaLanguageModel(
        parameters=total,
        computing=total if tied else total - embedding.numel(),
        width=embedding.shape[1],
        layers=config.num_hidden_layers,
        vocabulary=embedding.shape[0],
        context=getattr(config, "max_position_embeddings", None),
        lora=sum(module.in_features + module.out_features for module in inner),
        in_layers=sum(layers),
        largest_layer=max(layers),
        stored_width=stored.itemsize,
    )


def meta_encoder(model: ModelConfig, *, unet_rank: int = 0) -> MetaEncoder:
    """Built on the meta device of its configs; the arithmetic is counted operation by operation.

    Args:
        model: Config of the parts, which names the encoder.
        unet_rank: Rank of a LoRA on the cross-attention of the U-Net; 0 is none.

    Raises:
        BackboneError: A config cannot be had.
    """
    encoder = MetaEncoder()
    if model.kind == "vision":
        encoder.tokens = _add_vision(encoder, model.encoder)
        return encoder
    own = _add_diffusion(encoder, model, unet_rank)
    if model.kind == "diffusion":
        encoder.tokens = own
        return encoder
    clip = _add_vision(encoder, model.clip, trained=None if model.freeze_clip else model.layer)
    if model.how in MIXED:
        _add_mixer(encoder, model, clip, own)
    else:
        encoder.tokens = {"channel": clip, "interleave": 2 * clip}.get(model.how, clip + own)
    return encoder


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def counted_flops(call: Callable[[], Any]) -> float:
    """Floating-point operations of a call on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _add_diffusion(encoder: MetaEncoder, model: ModelConfig, unet_rank: int) -> int:
    """Add a diffusion model's parts; its tokens."""
    options = model.encoder_config()
    architecture = describe(model.encoder)
    taps = architecture.match_taps(options.taps or architecture.default_taps)
    size = options.size or architecture.default_size
    height, width = (size, size) if isinstance(size, int) else size
    parts = build_on_meta(architecture)
    encoder.stored[model.encoder] = sum(count(part) for part in parts.values())
    unet, vae, name = parts[architecture.denoiser], parts["vae"], architecture.denoiser
    texts = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
    short: Any = shortened(unet, [tap.name for tap in taps])
    side = max(height, width) // architecture.reduction
    files = FAMILY_FILES[architecture.family]
    known = {part: files.tokens_of(part, architecture.denoiser_config) for part in files.parts}
    lengths = {part: text_length(text.config, known[part]) for part, text in texts.items()}
    length = sum(lengths.get(part, known[part] or 0) for part in files.in_sequence)
    inputs = meta_inputs(config_of(unet), side, length=length)
    states = inputs["encoder_hidden_states"]
    steps = options.timestep if isinstance(options.timestep, tuple) else (options.timestep,)
    halves = 2 if options.conditioning in ("cfg", "concat") else 1
    rows = halves * len(steps) * options.draws
    picture = torch.empty(1, 3, height, width, dtype=torch.float32, device="meta")
    encoder.denoiser = name
    encoder.flops[name] = rows * counted_flops(lambda: short(**inputs))
    encoder.flops["vae"] = counted_flops(lambda: vae.encoder(picture))
    encoder.parameters |= {name: count(short), "vae": count(vae)}
    for part, text in texts.items():
        encoder.parameters[part] = count(text)
        embedded = text.get_input_embeddings().weight.numel()
        encoder.flops[part] = 2.0 * (count(text) - embedded) * lengths[part]
    channels = token_channels(options, taps)
    encoder.groups = (*encoder.groups, *channels)
    encoder.hidden_size += sum(channels)
    encoder.pixels, encoder.text_width = height * width, states.shape[2]
    if unet_rank:
        reached = reached_projections(config_of(unet), [tap.name for tap in taps])
        layers = [unet.get_submodule(path) for path in reached]
        sizes = sum(layer.in_features + layer.out_features for layer in layers)
        encoder.trained[f"{name} LoRA"] = unet_rank * sizes
    if model.captioner:
        if layout_of(config_of(unet)) is not None:
            raise ConfigError(
                f"a captioner adds to states of CLIP, which {model.encoder!r} does not read alone; "
                "leave model.captioner out, or use a model with a U-Net"
            )
        vision = _vision_model(model.captioner)
        encoder.stored[model.captioner] = _stored(model.captioner, vision[0])
        embedding = getattr(vision[0].config, "projection_dim", 768)
        projection = vision[0].config.hidden_size * embedding  # which vision models alone lack
        encoder.parameters["captioner's CLIP"] = count(vision[0]) + projection
        encoder.flops["captioner's CLIP"] = vision[1]
        *_, last = texts.values()
        pooled = last.config.projection_dim if len(texts) > 1 else None
        captioner = ImplicitCaptioner(
            embedding,
            states.shape[2],
            length=length,
            pooled_width=pooled,
            device="meta",
        )
        encoder.trained["captioner"] = count(captioner)
    if options.grid is not None:
        return token_count(options, _cells(options.grid))
    reductions = [tap.reduction for tap in taps]
    return token_count(options, _cells(middle_cells(size, architecture.reduction, reductions)))


def text_length(config: Any, known: int | None) -> int:
    """Number of tokens of a text that a text encoder reads.

    Args:
        config: Config of the text encoder.
        known: Number that its family is known to read; None takes the config's.
    """
    return int(config.max_position_embeddings if known is None else known)


def _add_mixer(encoder: MetaEncoder, model: ModelConfig, clip: int, own: int) -> None:
    """Add the weights that mix two streams, of so many tokens where each keeps its own grid."""
    (first, *rest), how = encoder.groups, model.how
    options: Any = {"config": model.mixing_config(), "text_width": encoder.text_width}
    mixer = make_mixer(how, (first,), rest, device="meta", **options)  # type: ignore[arg-type]
    tokens = own * len(model.encoder_config().timesteps) if how == "cross_attention" else clip
    place: dict[str, Any] = {"dtype": torch.float32, "device": "meta"}
    streams = torch.empty(1, clip, first, **place), torch.empty(1, tokens, sum(rest), **place)
    text = torch.empty(1, encoder.text_width, **place) if mixer.text_width else None
    encoder.flops["mixer"] = counted_flops(lambda: mixer(*streams, text))
    encoder.trained["mixer"] = count(mixer)
    encoder.groups, encoder.hidden_size = mixer.channels, mixer.width
    asks = mixer.config.asks if how == "cross_attention" else "clip"
    encoder.tokens = clip if asks == "clip" else own


def _no_pictures(*_: Any, **__: Any) -> Any:
    raise AssertionError("a plan reads no pictures")


def _add_vision(encoder: MetaEncoder, name: str, *, trained: int | None = None) -> int:
    """Add a vision model, of which what runs before a layer may train; its tokens."""
    vision, flops = _vision_model(name)
    config: Any = vision.config
    if trained is not None:
        read = ClipTokens(vision, _no_pictures, layer=trained, frozen=False)
        encoder.trained["vision model"] = sum(
            p.numel() for p in read.parameters() if p.requires_grad
        )
    encoder.parameters["vision model"] = count(vision)
    encoder.stored[name] = _stored(name, vision)
    encoder.flops["vision model"] = flops
    encoder.groups = (config.hidden_size, *encoder.groups)
    encoder.hidden_size += config.hidden_size
    side = _shown_side(name, config)
    encoder.pixels = max(encoder.pixels, side**2)
    return int((side // config.patch_size) ** 2)


def _vision_model(name: str) -> tuple[Any, float]:
    from transformers import AutoModel, CLIPVisionModel

    config = _config(name, _VISION_MODELS, "vision model")
    config = getattr(config, "vision_config", config)
    is_clip = config.model_type in ("clip_vision_model", "clip")
    with torch.device("meta"):
        model: Any = (
            CLIPVisionModel(config)
            if is_clip
            else AutoModel.from_config(config, trust_remote_code=False)
        )
        model = model.float()
    side = _shown_side(name, config)
    picture = torch.empty(1, 3, side, side, dtype=torch.float32, device="meta")
    return model, counted_flops(lambda: model(picture))


def _stored(name: str, vision: nn.Module) -> int:
    """Parameters in the files of a vision model, of which the half that sees may be all we read."""
    return count(vision) + (_CLIP_TEXT if "clip-vit-large" in name else 0)


def _shown_side(name: str, config: Any) -> int:
    """Side of the pictures that a vision model is shown: DINOv2's is below that of its config."""
    if config.model_type not in ("dinov2", "dinov2_with_registers"):
        return int(config.image_size)
    try:
        return processed_side(load_image_processor(name))
    except (DiffencError, OSError, ValueError):
        return _SHOWN_AT.get(name, int(config.image_size))


def _config(name: str, known: dict[str, dict[str, Any]], what: str) -> Any:
    """A model's config: its own, or where that is not at hand a bundled one."""
    from transformers import AutoConfig

    try:
        return model_config(name)
    except Exception as error:  # missing, offline, broken: each in words of its own
        if name in known:
            return AutoConfig.for_model(**known[name])
        raise BackboneError(
            f"the config of the {what} {name!r} cannot be had: "
            f"{reason(error)}. Pass a folder with config.json; without one "
            f"these are known: {', '.join(known)}"
        ) from error


def _cells(grid: int | tuple[int, int]) -> int:
    height, width = (grid, grid) if isinstance(grid, int) else grid
    return height * width
