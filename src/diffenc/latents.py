"""`pixel_values` to latents through a VAE."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc._typing import Posterior


def encode_latents(
    vae: Any,
    pixel_values: Float[Tensor, "b 3 height width"],
    *,
    posterior: Posterior = "mode",
    seed: int = 0,
) -> Float[Tensor, "b c h w"]:
    """Encode pictures and scale them as the U-Net expects.

    A VAE whose config says `force_upcast` overflows in half precision (SDXL's does): it is brought
    to float32 first, once and for good.

    Args:
        vae: An `AutoencoderKL`, or another autoencoder with the same `encode` and `config`.
        pixel_values: RGB in [-1, 1].
        posterior: "mode", or "sample": mean plus deviation times noise that all pictures share.
        seed: Of that noise; the global generator is not touched.

    Returns:
        Latents in float32, on the VAE's device.
    """
    if vae.dtype == torch.float16 and vae.config.get("force_upcast", False):
        vae.to(torch.float32)
    encoded = vae.encode(pixel_values.to(vae.device, vae.dtype))
    if hasattr(encoded, "latents"):  # TAESD and other deterministic autoencoders
        latents = encoded.latents
    elif posterior == "mode":
        latents = encoded.latent_dist.mode()
    else:
        mean, deviation = encoded.latent_dist.mean, encoded.latent_dist.std
        generator = torch.Generator().manual_seed(seed)
        latents = mean + deviation * torch.randn(mean.shape[1:], generator=generator).to(mean)
    shift = vae.config.get("shift_factor", None) or 0.0
    scaled: Tensor = (latents.float() - shift) * vae.config.scaling_factor
    return scaled
