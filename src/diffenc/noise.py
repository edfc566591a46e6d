"""Noise that every image, prompt and half of a comparison shares, and the noising itself."""

import hashlib
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc.errors import ConfigError


def shared_noise(
    shape: tuple[int, int, int], *, seed: int, timestep: int, draw: int = 0
) -> Float[Tensor, "c h w"]:
    """Standard normal noise that depends on its arguments alone.

    Drawn on the CPU in float32, so that all devices agree; the global generator is not touched.
    """
    digest = hashlib.sha256(f"diffenc noise {seed} {timestep} {draw}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator)


def add_noise(
    scheduler: Any,
    latents: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "c h w"] | Float[Tensor, "b c h w"],
    timestep: int,
) -> Float[Tensor, "b c h w"]:
    """Bring latents to the noise level of a scheduler step: sqrt(a) x + sqrt(1 - a) noise.

    Args:
        scheduler: Anything with diffusers' `alphas_cumprod`.
        latents: Scaled as the U-Net expects.
        noise: One tensor for all, or one per row.
        timestep: Scheduler step, 0 to the schedule's length - 1.

    Raises:
        ConfigError: The timestep lies outside the schedule.

    Source:
        Ho et al. 2020 (DDPM), arXiv:2006.11239, equation 4.
    """
    schedule = scheduler.alphas_cumprod
    if not 0 <= timestep < len(schedule):
        raise ConfigError(
            f"timestep must be in [0, {len(schedule)}) for this model's schedule, got {timestep}"
        )
    signal = float(schedule[timestep])
    return math.sqrt(signal) * latents + math.sqrt(1 - signal) * noise.to(latents)
