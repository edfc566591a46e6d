"""What a user writes by hand with diffusers: pipeline parts, forward hooks, one pass."""

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffenc.inputs.noise import shared_noise


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def latents_of(pipe, image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    config = pipe.vae.config
    encoded = pipe.vae.encode(pixels)
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
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


def stock_pass(pipe, latents: torch.Tensor, timestep: int, text: str, names=()):
    """Outputs of the transformer's modules in one step of a pipeline's own call.

    The pipeline encodes the text, packs latents, and chooses every argument of the transformer.

    Returns:
        Outputs by module path, "" being the transformer's own; the noise, and the noisy latents.
    """
    kind = type(pipe).__name__
    noise = shared_noise(tuple(latents.shape[1:]), seed=0, timestep=timestep)[None]
    height, width = (side * pipe.vae_scale_factor for side in latents.shape[2:])
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    if kind.startswith("PixArt"):
        pipe.scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
        signal = pipe.scheduler.alphas_cumprod[timestep]
        noisy = signal**0.5 * latents + (1 - signal) ** 0.5 * noise
        options |= {"timesteps": [timestep], "use_resolution_binning": False}
    else:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        sigma = timestep / 1000
        noisy = (1 - sigma) * latents + sigma * noise
        options |= {"sigmas": [sigma]}
    taken = noisy
    if kind == "SanaPipeline":
        options |= {"complex_human_instruction": None, "use_resolution_binning": False}
    elif kind == "FluxPipeline":
        guided = pipe.transformer.config.guidance_embeds
        options |= {"guidance_scale": 3.5, "max_sequence_length": 512 if guided else 256}
        taken = pipe._pack_latents(noisy, *noisy.shape)
    pipe.set_progress_bar_config(disable=True)
    outputs = hooked(
        pipe.transformer,
        ["", *names],
        lambda: pipe(text, height=height, width=width, latents=taken, **options),
    )
    return outputs, noise, noisy


def stock_map(pipe, name: str, output, h: int, w: int) -> torch.Tensor:
    """The picture's part of what a block gives, as a map of h x w cells."""
    kind = type(pipe).__name__
    if isinstance(output, tuple):
        output = output[1]  # text, picture
    return as_map(output[:, : h * w] if kind.startswith("Stable") else output[:, -h * w :], h, w)


def stock_error(pipe, latents: torch.Tensor, timestep: int, text: str) -> torch.Tensor:
    """Mean squared error of the noise that a pipeline's transformer predicts."""
    outputs, noise, noisy = stock_pass(pipe, latents, timestep, text)
    output = outputs[""][0]
    if type(pipe).__name__ == "FluxPipeline":
        height, width = (8 * side for side in latents.shape[2:])
        output = pipe._unpack_latents(output, height, width, 8)
    if type(pipe).__name__.startswith("PixArt"):
        predicted = output[:, : latents.shape[1]]
    else:
        predicted = noisy + (1 - timestep / 1000) * output
    return (predicted - noise).square().mean()
