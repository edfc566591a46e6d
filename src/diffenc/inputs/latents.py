"""`pixel_values` to latents through a VAE."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc._typing import Posterior
from diffenc.checks.fields import require_finite
from diffenc.inputs.noise import shared_noise
from diffenc.runtime.precision import keep_from_overflow
from diffenc.runtime.threads import lock_of


def encode_posterior(
    vae: Any, pixel_values: Float[Tensor, "b 3 height width"]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Encode pictures: mode and standard deviation of the latents, scaled as the U-Net expects.

    A VAE that overflows in half precision (SDXL's does, and says `force_upcast`) is brought to
    float32 first, once and for good.

    Args:
        vae: An `AutoencoderKL`, or another autoencoder with the same `encode` and `config`; a
            deterministic one (TAESD) gives a standard deviation of 0.
        pixel_values: Pictures in RGB, with values in [-1, 1].

    Returns:
        Both in float32, on the VAE's device.

    Raises:
        NonFiniteError: NaN or infinity came out of the VAE.
    """
    with lock_of(vae):  # no thread may see it half way
        keep_from_overflow(vae)
    encoded = vae.encode(pixel_values.to(vae.device, vae.dtype))
    plain = getattr(encoded, "latents", getattr(encoded, "latent", None))
    if plain is not None:
        mode = plain.float()
        deviation = torch.zeros_like(mode)
    else:
        mode, deviation = encoded.latent_dist.mode().float(), encoded.latent_dist.std.float()
    shift, scale = _scaling(vae.config, mode)
    for values in (mode, deviation):
        require_finite(
            values,
            f"latents of {type(vae).__name__} in {vae.dtype}",
            "load the model with dtype=torch.bfloat16 or torch.float32, and check the weights of "
            "the VAE if that is so already",
        )
    return ((mode - shift) * scale).contiguous(), (deviation * scale).contiguous()


def _scaling(config: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Shift that is subtracted from latents, and factor that they are then multiplied by.

    A VAE with means and deviations per channel (Playground 2.5's) is read as diffusers' SDXL
    pipelines read it.
    """
    scale = float(config.scaling_factor)
    mean, std = config.get("latents_mean", None), config.get("latents_std", None)
    if mean is None or std is None:
        return config.get("shift_factor", None) or 0.0, scale
    means, stds = (
        torch.as_tensor(values, dtype=latents.dtype, device=latents.device).reshape(1, -1, 1, 1)
        for values in (mean, std)
    )
    return means, scale / stds


def draw_latents(
    mode: Float[Tensor, "b c h w"],
    deviation: Float[Tensor, "b c h w"],
    posterior: Posterior,
    *,
    seed: int,
    draw: int = 0,
) -> Float[Tensor, "b c h w"]:
    """The mode itself, or a sample whose noise all pictures share; no global generator is used."""
    if posterior == "mode":
        return mode
    _, c, h, w = mode.shape
    noise = shared_noise((c, h, w), seed=seed, timestep=-1, draw=draw)
    return mode + deviation * noise.to(mode)


def encode_latents(
    vae: Any,
    pixel_values: Float[Tensor, "b 3 height width"],
    *,
    posterior: Posterior = "mode",
    seed: int = 0,
) -> Float[Tensor, "b c h w"]:
    """Scaled latents in float32: `encode_posterior`, then `draw_latents`."""
    return draw_latents(*encode_posterior(vae, pixel_values), posterior, seed=seed)
