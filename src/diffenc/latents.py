"""`pixel_values` to latents through a VAE."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc._typing import Posterior
from diffenc.noise import shared_noise


def encode_posterior(
    vae: Any, pixel_values: Float[Tensor, "b 3 height width"]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Encode pictures: mode and standard deviation of the latents, scaled as the U-Net expects.

    A VAE whose config says `force_upcast` overflows in half precision (SDXL's does): it is brought
    to float32 first, once and for good.

    Args:
        vae: An `AutoencoderKL`, or another autoencoder with the same `encode` and `config`; the
            deviation of a deterministic one (TAESD) is 0.
        pixel_values: RGB in [-1, 1].

    Returns:
        Both in float32, on the VAE's device.
    """
    if vae.dtype == torch.float16 and vae.config.get("force_upcast", False):
        vae.to(torch.float32)
    encoded = vae.encode(pixel_values.to(vae.device, vae.dtype))
    if hasattr(encoded, "latents"):
        mode = encoded.latents.float()
        deviation = torch.zeros_like(mode)
    else:
        mode, deviation = encoded.latent_dist.mode().float(), encoded.latent_dist.std.float()
    shift = vae.config.get("shift_factor", None) or 0.0
    scale = float(vae.config.scaling_factor)
    return ((mode - shift) * scale).contiguous(), (deviation * scale).contiguous()


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
