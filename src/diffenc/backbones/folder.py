"""Reading a diffusers folder: which model it is, its parts, and clear errors where it is broken."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from diffenc.backbones.base import Backbone
from diffenc.backbones.configs import Architecture
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
) -> Backbone:
    """Load every part of a diffusers folder.

    Args:
        folder: Holds `model_index.json`.
        name: What the backbone is called in messages and configs.
        dtype: Of U-Net and text encoders; the VAE stays in float32 where half precision overflows.
        device: Where the parts go.
        own_taps: See `Architecture`.
        keep_taps: Module paths of the U-Net; what lies behind the last of them is not loaded. None
            loads everything.

    Raises:
        BackboneError: The folder is missing, incomplete or broken, or names another kind of model.
    """
    family, index = read_model_index(folder)
    told = read_architecture(folder, own_taps=own_taps)
    parts = {part: _load_part(folder, part, dtype, device, keep_taps) for part in _PARTS[family]}
    options: dict[str, Any] = {"default_size": told.default_size, "default_taps": told.default_taps}
    if family == "sdxl":
        from diffenc.backbones.sdxl import StableDiffusionXL

        force_zeros = bool(index.get("force_zeros_for_empty_prompt", True))
        return StableDiffusionXL(name=name, force_zeros=force_zeros, **options, **parts)
    from diffenc.backbones.sd import StableDiffusion

    return StableDiffusion(name=name, **options, **parts)


def _load_part(
    folder: Path,
    part: str,
    dtype: torch.dtype,
    device: str | torch.device,
    keep_taps: Sequence[str] | None,
) -> Any:
    try:
        if part.startswith("tokenizer"):
            from transformers import CLIPTokenizer

            return CLIPTokenizer.from_pretrained(folder / part)
        if part == "scheduler":
            from diffusers import DDPMScheduler

            config = read_config(folder, part)
            kept = {key: config[key] for key in _SCHEDULE if key in config}
            return DDPMScheduler.from_config(kept)
        if part == "unet" and keep_taps is not None:
            return _load_truncated(folder / part, dtype, keep_taps).to(device)
        return _load_weights(folder, part, dtype).to(device)
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

    with torch.device("meta"):
        whole = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    short = truncate(whole, taps)
    wanted = set(short.state_dict())
    state = {}
    for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        if ".fp16." in file.name or ".non_ema." in file.name:
            continue
        with safe_open(file, framework="pt") as weights:
            for key in wanted.intersection(weights.keys()):
                state[key] = weights.get_tensor(key).to(dtype)
    if missing := sorted(wanted - state.keys()):
        raise BackboneError(f"{folder} lacks {len(missing)} weights, such as {missing[0]!r}")
    short.load_state_dict(state, assign=True)
    return short


def _load_weights(folder: Path, part: str, dtype: torch.dtype) -> Any:
    config = read_config(folder, part)
    if part == "unet":
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_pretrained(folder / part, torch_dtype=dtype)
    if part == "vae":
        from diffusers import AutoencoderKL

        overflows = dtype == torch.float16 and config.get("force_upcast", False)
        vae_dtype = torch.float32 if overflows else dtype
        return AutoencoderKL.from_pretrained(folder / part, torch_dtype=vae_dtype)
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
    loaded: Any = model.from_pretrained(folder / part)
    return loaded.to(dtype)
