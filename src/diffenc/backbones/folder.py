"""Reading a diffusers folder: which model it is, its parts, and clear errors where it is broken."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from diffenc.backbones.base import Backbone
from diffenc.backbones.configs import Architecture
from diffenc.backbones.parts import (
    GivenParts,
    fitting_tokenizer,
    load_text_encoder,
    load_tokenizer,
)
from diffenc.backbones.weights import load_unet
from diffenc.errors import BackboneError
from diffenc.truncation import truncate

_PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": None,
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
}
_PARTS = {
    "sd": ("unet", "vae", "scheduler", "text_encoder", "tokenizer"),
    "sdxl": (
        "unet",
        "vae",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
    ),
}


def read_model_index(folder: Path) -> tuple[str, dict[str, Any]]:
    """Family ("sd" or "sdxl") and content of a folder's `model_index.json`.

    Raises:
        BackboneError: No folder, no or a broken index, or a pipeline that diffenc cannot read.
    """
    index_file = folder / "model_index.json"
    if not folder.is_dir():
        raise BackboneError(f"no such model folder: {folder}")
    if not index_file.is_file():
        raise BackboneError(
            f"{folder} is no diffusers folder: it has no model_index.json. Pass the folder that "
            "holds unet/, vae/, text_encoder/, tokenizer/ and scheduler/."
        )
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        pipeline = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise BackboneError(f"{index_file} is broken: {error!r}") from error
    family = _PIPELINES.get(pipeline)
    if family is None:
        known = sorted(name for name, kind in _PIPELINES.items() if kind)
        raise BackboneError(f"{folder} holds a {pipeline}; diffenc reads {known}")
    missing = [part for part in _PARTS[family] if not (folder / part).is_dir()]
    if missing:
        raise BackboneError(f"{folder} is incomplete: it lacks {', '.join(missing)}")
    return family, index


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """A part's JSON config.

    Raises:
        BackboneError: Missing or broken.
    """
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = folder / part / name
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"cannot read {path}: {error}") from error
    return config


def read_architecture(folder: Path, *, own_taps: tuple[str, ...] | None = None) -> Architecture:
    """What a folder's configs tell; no weights are needed.

    Raises:
        BackboneError: The folder is missing, incomplete or broken.
    """
    family, _ = read_model_index(folder)
    names = [part for part in _PARTS[family] if not part.startswith("tokenizer")]
    return Architecture({name: read_config(folder, name) for name in names}, own_taps)


def load_folder(
    folder: Path,
    *,
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    own_taps: tuple[str, ...] | None = None,
    keep_taps: Sequence[str] | None = None,
    given: GivenParts | None = None,
) -> Backbone:
    """Load every part of a diffusers folder that is not given.

    Args:
        folder: Holds `model_index.json`.
        name: What the backbone is called in messages and configs.
        dtype: Of U-Net and text encoders; the VAE stays in float32 where half precision overflows.
        device: Where the parts go.
        own_taps: See `Architecture`.
        keep_taps: Module paths of the U-Net; what lies behind the last of them is not loaded. None
            loads everything.
        given: Parts in place of the folder's.

    Raises:
        BackboneError: The folder is missing, incomplete or broken, or names another kind of model.
    """
    given = given or GivenParts()
    family, index = read_model_index(folder)
    told = given.described(read_architecture(folder, own_taps=own_taps))
    parts = {}
    for part in _PARTS[family]:
        loaded = given.load(part, told, dtype=dtype, keep_taps=keep_taps)
        parts[part] = _load_part(folder, part, dtype, keep_taps) if loaded is None else loaded
    if family == "sdxl":
        parts["force_zeros"] = bool(index.get("force_zeros_for_empty_prompt", True))
    return assemble(name, told, parts, device)


def assemble(
    name: str, told: Architecture, parts: dict[str, Any], device: str | torch.device
) -> Backbone:
    """A backbone of loaded parts, on a device.

    Raises:
        BackboneError: Parts do not fit each other.
    """
    for part in ("tokenizer", "tokenizer_2"):
        if part in parts:
            encoder = parts[part.replace("tokenizer", "text_encoder")]
            parts[part] = fitting_tokenizer(parts[part], encoder)
    for part, module in parts.items():
        if isinstance(module, torch.nn.Module):
            parts[part] = module.to(device)
    if told.family == "sdxl":
        from diffenc.backbones.sdxl import StableDiffusionXL

        return StableDiffusionXL(name=name, default_taps=told.default_taps, **parts)
    from diffenc.backbones.sd import StableDiffusion

    return StableDiffusion(name=name, default_taps=told.default_taps, **parts)


def make_scheduler(config: dict[str, Any]) -> Any:
    """The noise schedule of a config, whatever sampler it names."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config({key: config[key] for key in _SCHEDULE if key in config})


def _load_part(folder: Path, part: str, dtype: torch.dtype, keep_taps: Sequence[str] | None) -> Any:
    try:
        if part.startswith("tokenizer"):
            return load_tokenizer(folder / part)
        if part == "scheduler":
            return make_scheduler(read_config(folder, part))
        if part.startswith("text_encoder"):
            return load_text_encoder(folder / part, part, dtype)
        if part == "unet" and keep_taps is not None:
            return _load_truncated(folder / part, dtype, keep_taps)
        return _load_weights(folder, part, dtype)
    except BackboneError:
        raise
    except Exception as error:  # the libraries raise anything from OSError to SafetensorError
        raise BackboneError(f"cannot load {folder / part}: {error}") from error


_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def _load_truncated(folder: Path, dtype: torch.dtype, taps: Sequence[str]) -> Any:
    """A U-Net that ends after the last tap; only its own weights are read from the files."""
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(folder)
    with torch.device("meta"):
        wanted = set(truncate(UNet2DConditionModel.from_config(config), taps).state_dict())
    state = {}
    for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        if ".fp16." in file.name or ".non_ema." in file.name:
            continue
        with safe_open(file, framework="pt") as weights:
            for key in wanted.intersection(weights.keys()):
                state[key] = weights.get_tensor(key)
    return load_unet(config, state, what=str(folder), dtype=dtype, keep_taps=taps)


def _load_weights(folder: Path, part: str, dtype: torch.dtype) -> Any:
    config = read_config(folder, part)
    if part == "unet":
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_pretrained(folder / part, torch_dtype=dtype)
    from diffusers import AutoencoderKL

    overflows = dtype == torch.float16 and config.get("force_upcast", False)
    vae_dtype = torch.float32 if overflows else dtype
    return AutoencoderKL.from_pretrained(folder / part, torch_dtype=vae_dtype)
