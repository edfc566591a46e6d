"""Features equal hooks on a plain diffusers pipeline, step by step, for every family."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffenc import DiffusionEncoder
from diffenc.inputs.noise import shared_noise

TAPS = {
    "tiny_sd_folder": ("up_blocks.1", "up_blocks.2.resnets.0", "up_blocks.3.attentions.1"),
    "tiny_sd21_folder": ("up_blocks.1", "up_blocks.2.attentions.1"),
    "tiny_sdxl_folder": ("up_blocks.0", "up_blocks.1.attentions.0"),
}


def plain_features(pipe, image, prompt, timestep, size, taps) -> dict[str, torch.Tensor]:
    """What a user writes by hand: pipeline parts, forward hooks, one conditional pass."""
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    values = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
    latents = pipe.vae.encode(values).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = shared_noise(tuple(latents.shape[1:]), seed=0, timestep=timestep)[None]
    signal = pipe.scheduler.alphas_cumprod[timestep]
    noisy = signal**0.5 * latents + (1 - signal) ** 0.5 * noise
    encoded = pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    kwargs = {"encoder_hidden_states": encoded[0]}
    if len(encoded) == 4:
        time_ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)
        kwargs["added_cond_kwargs"] = {"text_embeds": encoded[2], "time_ids": time_ids}
    found = {}
    handles = [
        pipe.unet.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: found.update(
                {name: out[0] if isinstance(out, tuple) else out}
            )
        )
        for name in taps
    ]
    pipe.unet(noisy, timestep, **kwargs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.long
@pytest.mark.parametrize("timestep", [50, 261])
@pytest.mark.parametrize("kind", TAPS)
@torch.no_grad()
def test_features_equal_hooks_on_the_plain_pipeline(request, kind, timestep):
    folder = request.getfixturevalue(kind)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(pixels)
    encoder = DiffusionEncoder.from_pretrained(folder, taps=TAPS[kind], timestep=timestep, size=64)
    ours = encoder.extract(image, "a red circle left of a blue square")
    pipe = DiffusionPipeline.from_pretrained(folder)
    prompt = "a red circle left of a blue square"
    theirs = plain_features(pipe, image, prompt, timestep, 64, TAPS[kind])
    for tap in TAPS[kind]:
        difference = (ours[tap] - theirs[tap]).abs().max()
        assert difference <= 1e-5 * theirs[tap].abs().max()
