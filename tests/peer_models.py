"""Tiny models whose weights follow from the names of their parameters alone.

Outputs of other programs that lie in `golden/peers` were made with them, some under old versions of
diffusers and transformers, which build modules in another order: seeds of `torch` would not do.
"""

import hashlib
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image

import builders

PROMPT = "a red zebra left of a blue square"
OTHER = "a photo"


def save_peer_model(folder: Path, kind: Literal["sd1.5", "sd2.1-base", "sdxl"]) -> Path:
    """Write a pipeline of that shape, native to 512 pixels (SDXL: 1024), with named weights."""
    folder = builders.save_sdxl(folder) if kind == "sdxl" else builders.save_sd(folder, kind)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    if kind == "sdxl":  # the tiny one has fewer transformer blocks than GDF reads
        options = {"sample_size": 128, "transformer_layers_per_block": (1, 2, 8)}
        pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | options)
    else:
        pipeline.unet.register_to_config(sample_size=64)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (module := getattr(pipeline, part, None)) is not None:
            name_weights(module)
    pipeline.save_pretrained(folder)
    return folder


def name_weights(module: torch.nn.Module) -> None:
    """Give each parameter values that its name decides."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values_of(name, parameter.shape))


def values_of(name: str, shape: torch.Size) -> torch.Tensor:
    """The values of a parameter, so that layers keep the scale of what goes through them."""
    # A prefix that transformers has in some versions.
    digest = hashlib.sha256(name.removeprefix("text_model.").encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Pixels without meaning, in a size that needs no resizing."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)
