"""What a user writes by hand with diffusers: pipeline parts, forward hooks, one pass."""

import numpy as np
import torch
from PIL import Image


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def latents_of(pipe, image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    config = pipe.vae.config
    latents = pipe.vae.encode(pixels).latent_dist.mode()
    return (latents - (config.get("shift_factor") or 0)) * config.scaling_factor


def hooked(model: torch.nn.Module, names, call) -> dict[str, object]:
    """Outputs of named modules while `call` runs, as they come."""
    outputs: dict[str, object] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: outputs.__setitem__(name, output)
        )
        for name in names
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def as_map(tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], h, w)


def agree(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())
