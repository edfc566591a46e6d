"""The model that a config describes, with what its stage trains unfrozen."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError, ConfigError
from diffenc.fusion import FusedEncoder
from diffenc.mllm.language import load_language_model, width_of
from diffenc.mllm.model import DiffusionVLM
from diffenc.mllm.model_folder import is_saved
from diffenc.mllm.training.config import AdaptConfig, ModelConfig, TrainConfig, usual_adapt
from diffenc.mllm.training.grounded import GroundedEncoder
from diffenc.mllm.vision import VisionTokens
from diffenc.models.encoder_folder import BACKBONE_FOLDER, read_config
from diffenc.models.encoder_folder import is_saved as is_saved_encoder
from diffenc.models.sources import lasting_source
from diffenc.projector.choosing import projector_for
from diffenc.storage.names import expanded
from diffenc.storage.pretrained import lasting_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_vlm(config: TrainConfig, *, device: str | torch.device = "cpu") -> DiffusionVLM:
    """The model at the beginning of a stage.

    What is made anew (projector, captioner, LoRA) is seeded by `config.seed`; the global generator
    is left as it was.

    Args:
        config: Config of the run.
        device: Device of the model.

    Raises:
        BackboneError: A model is missing.
        ConfigError: The earlier stage's model is another one than the config says.
    """
    model, adapt = config.model, config.adapting
    dtype = DTYPES[config.optimizing.precision]
    language = (
        torch.float32 if adapt.language_model == "full" else dtype
    )  # what trains is in float32
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        parts = (
            _started(model, device, dtype, language)
            if model.start
            else _begun(model, device, dtype, language, seed=config.seed)
        )
        vlm = DiffusionVLM(
            **parts,
            template=model.template,  # type: ignore[arg-type]  # checked by the config
            prompt_policy=config.data.prompts,
            image_batch_size=model.image_batch_size,
        )
        _unfreeze(vlm, model, adapt)
    if not isinstance(vlm.encoder, VisionTokens):
        config.check_words(vlm.encoder.config.tokens)
    return vlm


def build_grounded(config: TrainConfig, *, device: str | torch.device = "cpu") -> GroundedEncoder:
    """The encoder at the beginning of a run that grounds it.

    Args:
        config: Config of the run, whose stage is "ground".
        device: Device of the model.

    Raises:
        BackboneError: The model is missing.
        ConfigError: It joins picture and text in one attention, or its schedule is shorter.
    """
    ground = config.ground
    assert ground is not None
    dtype = DTYPES[config.optimizing.precision]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        # Whole where it predicts noise, and otherwise without what lies behind the last tap.
        whole = ground.denoising is not False
        encoder = load_encoder(config.model, device=device, dtype=dtype, truncate=not whole)
        encoder.requires_grad_(False)
        _train_lora(encoder, config.adapting, usual_adapt("ground"))
        model = GroundedEncoder(encoder, ground)
    for _, parameter in model.named_trainable_parameters():
        parameter.data = parameter.data.float()
    return model


def _begun(
    model: ModelConfig,
    device: str | torch.device,
    dtype: torch.dtype,
    language_dtype: torch.dtype,
    *,
    seed: int,
) -> dict[str, Any]:
    """Parts of a new model, by parameter of `DiffusionVLM`."""
    encoder = load_encoder(model, device=device, dtype=dtype, seed=seed)
    language_model, tokenizer = load_language_model(
        model.language_model, device=device, dtype=language_dtype
    )
    projector = projector_for(
        encoder, width_of(language_model), model.projector, norm=model.projector_norm
    )
    return {
        "encoder": encoder,
        "language_model": language_model,
        "tokenizer": tokenizer,
        "projector": projector.to(device),
    }


def _started(
    model: ModelConfig,
    device: str | torch.device,
    dtype: torch.dtype,
    language_dtype: torch.dtype,
) -> dict[str, Any]:
    """Parts of the model of an earlier stage, by parameter of `DiffusionVLM`."""
    start = Path(model.start)
    if not is_saved(start):
        raise BackboneError(
            f"{start} holds no trained model (no vlm.json); run the earlier stage first, or leave "
            "model.start out"
        )
    # As a new model is made: without what lies behind the last tap.
    options = {} if model.kind == "vision" else {"truncate": True, **model.options}
    vlm = DiffusionVLM.from_pretrained(start, device=device, dtype=dtype, trainable=True, **options)
    if language_dtype == torch.float32:
        vlm.language_model.float()
    _check_agreement(vlm, model)
    return {
        "encoder": vlm.encoder,
        "language_model": vlm.language_model,
        "tokenizer": vlm.tokenizer,
        "projector": vlm.projector,
        "system": vlm.chat.system,
    }


def _check_agreement(vlm: DiffusionVLM, model: ModelConfig) -> None:
    """Raise a `ConfigError` where a config names other parts than an earlier stage trained."""
    start, kind = Path(model.start), _kind_of(vlm.encoder)
    if kind != model.kind:
        raise ConfigError(
            f"{start} was trained with an encoder of the kind {kind!r}, and model.kind is "
            f"{model.kind!r}; make them agree"
        )
    if isinstance(vlm.encoder, FusedEncoder):
        _check_how(vlm.encoder, model)
    if isinstance(vlm.encoder, VisionTokens):
        vlm.encoder.pad = model.pad
    default = ModelConfig()
    for key, trained in _trained_parts(vlm).items():
        stated = getattr(model, key)
        if stated == getattr(default, key):
            continue
        if (_lasting(key, kind, stated) if isinstance(stated, str) else stated) != trained:
            raise ConfigError(
                f"{start} was trained with {key} = {trained!r}, and model.{key} is {stated!r}; "
                "leave that out, or begin with the earlier stage"
            )
    if vlm.projector.kind != model.projector:
        raise ConfigError(
            f"{start} has a projector of the kind {vlm.projector.kind!r}, and model.projector is "
            f"{model.projector!r}; make them agree"
        )


def _trained_parts(vlm: DiffusionVLM) -> dict[str, Any]:
    """What an earlier stage trained with, by key of `ModelConfig`; but parts without a name."""
    encoder: Any = vlm.encoder
    diffusion: Any = getattr(encoder, "diffusion", encoder)
    clip: Any = getattr(encoder, "clip", None) if isinstance(encoder, FusedEncoder) else None
    reader = encoder if isinstance(encoder, VisionTokens) else clip
    vision = isinstance(encoder, VisionTokens)
    name = encoder.name if vision else lasting_source(diffusion.backbone.name)
    captioner = None if getattr(diffusion, "captioner", None) is None else diffusion.clip.name
    trained = {
        "encoder": name,
        "clip": None if clip is None else clip.name,
        "layer": None if reader is None else reader.layer,
        "captioner": captioner,
        "language_model": getattr(vlm.language_model, "name_or_path", "") or None,
        "projector_norm": bool(_norms(vlm.projector)),
    }
    return {key: value for key, value in trained.items() if value is not None}


def _norms(projector: Any) -> list[int]:
    """Widths of the norms of a projector, of both of a fused one."""
    groups = projector.norm_channels
    flat = [each if isinstance(each, Sequence) else (each,) for each in groups]
    return [width for group in flat for width in group]


def _lasting(key: str, kind: str, name: str) -> str:
    """A stated name as a model has it; for a saved encoder the name of its backbone."""
    if key != "encoder" or kind == "vision":
        return lasting_name(name)
    if is_saved_encoder(name):
        folder = expanded(name)
        contents = read_config(folder)[1]
        name = str(folder / BACKBONE_FOLDER) if contents.included else contents.backbone
    return lasting_source(name)


def _check_how(encoder: FusedEncoder, model: ModelConfig) -> None:
    """Raise a `ConfigError` where a config says another way of fusing than was trained."""
    if model.how not in (ModelConfig().how, encoder.how):
        raise ConfigError(
            f"{model.start} was trained with how = {encoder.how!r}, and model.how is "
            f"{model.how!r}; leave that out, or begin with the earlier stage"
        )
    has = {} if encoder.mixer is None else asdict(encoder.mixer.config)
    for name, value in model.mixing.items():
        if has.get(name) != value:
            raise ConfigError(
                f"{model.start} was trained with mixing.{name} = {has.get(name)!r}, and "
                f"model.mixing.{name} is {value!r}; leave that out, or begin with the earlier stage"
            )


def load_encoder(
    model: ModelConfig,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    truncate: bool = True,
) -> Any:
    """The encoder that a config names, frozen but for a mixer, which `seed` begins.

    Args:
        model: Parts of the model.
        device: Device of the encoder.
        dtype: Floating point type of the frozen weights.
        seed: Seed of the mixer's weights.
        truncate: Whether a diffusion model ends after the last tap.

    Raises:
        BackboneError: There is no such model.
    """
    if model.kind == "vision":
        return VisionTokens.from_pretrained(
            model.encoder, layer=model.layer, pad=model.pad, device=device, dtype=dtype
        )
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in model.options.items()
    }
    encoder = DiffusionEncoder.from_pretrained(
        model.encoder, device=device, dtype=dtype, truncate=truncate, **options
    )
    if model.kind == "diffusion":
        return encoder
    mixing = model.mixing_config(seed)
    return FusedEncoder(model.clip, encoder, model.how, layer=model.layer, mixing=mixing)


def _unfreeze(vlm: DiffusionVLM, model: ModelConfig, adapt: AdaptConfig) -> None:
    """Freeze everything but what the stage trains."""
    diffusion: Any = getattr(vlm.encoder, "diffusion", vlm.encoder)
    vlm.requires_grad_(False)
    vlm.projector.requires_grad_(True)
    if isinstance(vlm.encoder, FusedEncoder):
        clip = vlm.encoder.clip
        clip.freeze(model.freeze_clip)  # also one that an earlier stage trained
        if not clip.frozen:
            clip.float()  # whole: what trains is in float32, and what runs behind it reads that
        if vlm.encoder.mixer is not None:
            vlm.encoder.mixer.requires_grad_(True)
    if model.captioner and diffusion.captioner is None:
        diffusion.add_captioner(model.captioner)
    if getattr(diffusion, "captioner", None) is not None:
        diffusion.captioner.requires_grad_(bool(model.captioner))
    if adapt.unet_rank:
        _train_lora(diffusion, adapt, AdaptConfig())
    if adapt.language_model == "full":
        vlm.language_model.requires_grad_(True)
    elif adapt.language_model == "lora":
        adapters = getattr(vlm.language_model, "peft_config", None)
        if adapters is None:
            vlm.add_language_lora(rank=adapt.rank, alpha=adapt.alpha, dropout=adapt.dropout)
        else:
            has = next(iter(adapters.values()))
            _check_lora(has, adapt, AdaptConfig(), "language model", "")
        for path, parameter in vlm.language_model.named_parameters():
            parameter.requires_grad_(".lora_" in path)
    for _, parameter in vlm.named_trainable_parameters():
        parameter.data = parameter.data.float()


def _train_lora(encoder: DiffusionEncoder, adapt: AdaptConfig, usual: AdaptConfig) -> None:
    """Train the LoRA that an encoder has, or a new one.

    Args:
        encoder: Encoder, frozen.
        adapt: Options of the LoRA.
        usual: Options where nothing is stated; of a LoRA that is there they say nothing.

    Raises:
        ConfigError: It has one of another rank, scale or dropout.
    """
    name = encoder.active_lora
    if name is None:
        encoder.add_lora(rank=adapt.unet_rank, alpha=adapt.unet_alpha, dropout=adapt.unet_dropout)
        return
    _check_lora(encoder.backbone.denoiser.peft_config[name], adapt, usual, "encoder", "unet_")
    encoder.set_lora(name, trainable=True)


def _check_lora(has: Any, adapt: AdaptConfig, usual: AdaptConfig, owner: str, prefix: str) -> None:
    """Raise a `ConfigError` where a config states another adapter than there is."""
    for key, value in (("rank", has.r), ("alpha", has.lora_alpha), ("dropout", has.lora_dropout)):
        name = f"{prefix}{key}"
        stated = getattr(adapt, name)
        if stated not in (getattr(usual, name), value):
            raise ConfigError(
                f"the {owner} has a LoRA already, with {key} {value:g}, which goes on training, "
                f"and adapt.{name} is {stated:g}; make them agree, or begin with a model without"
            )


def _kind_of(encoder: nn.Module) -> str:
    if isinstance(encoder, FusedEncoder):
        return "fused"
    return "vision" if isinstance(encoder, VisionTokens) else "diffusion"
