"""Noise that every image, prompt and half of a comparison shares, and the noising itself."""

import hashlib
import math
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from diffenc.checks.arguments import whole
from diffenc.errors import ConfigError


def shared_noise(
    shape: tuple[int, int, int], *, seed: int, timestep: int, draw: int = 0
) -> Float[Tensor, "c h w"]:
    """Standard normal noise that depends on its arguments alone.

    Drawn on the CPU in float32, so that all devices agree; the global generator is not touched.
    """
    # Numbers that are equal draw the same noise, and what is no whole number draws none.
    seed, timestep, draw = whole("seed", seed), whole("timestep", timestep), whole("draw", draw)
    digest = hashlib.sha256(f"diffenc noise {seed} {timestep} {draw}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is one of flow matching: noise is mixed in, not added in steps."""
    return not hasattr(scheduler, "alphas_cumprod") and hasattr(scheduler, "sigmas")


def signal_levels(scheduler: Any) -> Float[Tensor, " steps"]:
    """How much of a picture each step leaves, on the CPU: `alphas_cumprod` of a scheduler.

    Of flow matching it is 1 - t/N at step t of N, without the shift that sampling adds: the share
    of the latents themselves, where `alphas_cumprod` is that of their variance.

    Raises:
        ConfigError: They do not fall from at most 1 to at least 0, or are no numbers.

    Source:
        Lipman et al. 2022 (flow matching), arXiv:2210.02747, section 4.1, example II.
    """
    if is_flow(scheduler):
        steps = int(scheduler.config.num_train_timesteps)
        return 1 - torch.arange(steps, dtype=torch.float64, device="cpu") / steps
    levels = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64, device="cpu").detach()
    values = levels.double().numpy()
    falls = values.ndim == 1 and len(values) > 1 and bool((values[1:] <= values[:-1]).all())
    if not falls or not 1 >= values[0] > values[-1] >= 0:
        raise ConfigError(
            f"the noise levels of {type(scheduler).__name__} must fall from 1 at most to 0 at "
            f"least, and alphas_cumprod {_described(values)}; check beta_start, beta_end and "
            "beta_schedule of its config"
        )
    return levels


def _described(values: Any) -> str:
    if values.ndim != 1 or len(values) < 2:
        return f"has the shape {values.shape}"
    if not np.isfinite(values).all():
        return "holds NaN or infinity"
    return f"goes from {values[0]:.4g} to {values[-1]:.4g}, between {values.min():.4g} and " + (
        f"{values.max():.4g}"
    )


def add_noise(
    scheduler: Any,
    latents: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "c h w"] | Float[Tensor, "b c h w"],
    timestep: int,
) -> Float[Tensor, "b c h w"]:
    """Bring latents to the noise level of a scheduler step: sqrt(a) x + sqrt(1 - a) noise.

    In flow matching it is a x + (1 - a) noise.

    Args:
        scheduler: Scheduler of diffusers, or any other object with its `alphas_cumprod`.
        latents: Latents without noise, scaled as the U-Net expects.
        noise: Standard normal noise, one tensor for all rows or one per row.
        timestep: Scheduler step of the noise level, 0 to the schedule's length - 1.

    Raises:
        ConfigError: The timestep lies outside the schedule.

    Source:
        Ho et al. 2020 (DDPM), arXiv:2006.11239, equation 4.
    """
    schedule, timestep = signal_levels(scheduler), whole("timestep", timestep)
    if not 0 <= timestep < len(schedule):
        raise ConfigError(
            f"timestep must be in [0, {len(schedule)}) for this model's schedule, got {timestep}"
        )
    signal = float(schedule[timestep])
    if is_flow(scheduler):
        return signal * latents + (1 - signal) * noise.to(latents)
    return math.sqrt(signal) * latents + math.sqrt(1 - signal) * noise.to(latents)


def to_noise(
    scheduler: Any,
    prediction_type: str,
    output: Float[Tensor, "rows c h w"],
    noisy_latents: Float[Tensor, "rows c h w"],
    timesteps: Int[Tensor, " rows"],
) -> Float[Tensor, "rows c h w"]:
    """The noise in latents, from what a U-Net predicts of them.

    Args:
        scheduler: Scheduler of diffusers, or any other object with its `alphas_cumprod`.
        prediction_type: Quantity that the denoiser predicts: "epsilon", "v_prediction", "sample",
            or "flow", the noise less the latents.
        output: Prediction of the U-Net; the result has the same dtype.
        noisy_latents: Noisy latents that the U-Net was given.
        timesteps: Scheduler step of each row, 0 to the schedule's length - 1.

    Raises:
        ConfigError: Another type of prediction, or one that is none of this schedule.

    Source:
        Salimans and Ho 2022 (v-prediction), arXiv:2202.00512, appendix D.
    """
    known = ("flow",) if is_flow(scheduler) else ("epsilon", "v_prediction", "sample")
    if prediction_type not in known:
        raise ConfigError(
            f"cannot derive noise from a model that predicts {prediction_type!r}; with "
            f"{type(scheduler).__name__} it must be {' or '.join(map(repr, known))}"
        )
    noisy = noisy_latents.to(output)
    signal = signal_levels(scheduler).double()[timesteps.cpu()]
    signal = rearrange(signal, "rows -> rows 1 1 1")
    if prediction_type == "flow":
        return noisy + signal.to(output) * output
    of_image: Tensor = signal.sqrt().to(output)
    of_noise: Tensor = (1 - signal).sqrt().to(output)
    if prediction_type == "v_prediction":
        return of_image * output + of_noise * noisy
    return output if prediction_type == "epsilon" else (noisy - of_image * output) / of_noise


def denoising_target(
    scheduler: Any,
    prediction_type: str,
    latents: Float[Tensor, "rows c h w"],
    noise: Float[Tensor, "rows c h w"],
    timesteps: Int[Tensor, " rows"],
) -> Float[Tensor, "rows c h w"]:
    """What a denoiser is trained to predict of noisy latents.

    Args:
        scheduler: Scheduler of diffusers, or any other object with its `alphas_cumprod`.
        prediction_type: Quantity that the denoiser predicts, see `to_noise`.
        latents: Latents without noise.
        noise: Noise that was added to them.
        timesteps: Scheduler step of each row.

    Raises:
        ConfigError: Another type of prediction.
    """
    if prediction_type == "flow":
        return noise - latents
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    if prediction_type != "v_prediction":
        raise ConfigError(f"cannot train a model that predicts {prediction_type!r}")
    signal = rearrange(signal_levels(scheduler)[timesteps.cpu()], "rows -> rows 1 1 1")
    return signal.sqrt().to(noise) * noise - (1 - signal).sqrt().to(noise) * latents
