"""Train the autoencoder of the miniature model: L1 and squared error on rendered scenes.

    python tools/shapes/train_vae.py --steps 2500
    python tools/shapes/train_vae.py --size 96 --crowds 0.65 --stds 1.6 0.4 0.5 0.4

Resumable: started again, it goes on from `--run`. Writes a diffusers folder to `--output`.

A diffusion model can only learn what its noise does not drown. Without care one latent channel
takes nearly all the variance and colours end up in the others, below the noise at all timesteps.
So the latents are kept uncorrelated and of given variances, by a penalty while training and exactly
afterwards, and the decoder reads them through noise.
"""

import argparse
import json
import random
from collections.abc import Sequence
from functools import partial
from operator import eq
from pathlib import Path

import numpy as np
import torch
import worlds
from detector import detect
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from training import VALIDATION_SEED, Run

from diffenc.shapes.crowds import sample_crowd
from diffenc.shapes.pictures import sample_pictures
from diffenc.shapes.render import render_array
from diffenc.shapes.scenes import sample_scene, sample_scenes

SCALING_FACTOR = 0.18215
"""Stable Diffusion's: a program that forgets to multiply by it is seen at once."""
LATENT_STDS = (2.0, 0.1, 0.2, 0.1)
"""Standard deviations of the channels of scaled latents.

What the noise hides, the text must tell. With 1 in all channels, shapes as large and plain as these
are seen through the noise of nearly every timestep, and a U-Net learnt colours slowly and relations
not at all; with 0.25 in all, it had to guess places too. One wide channel shows that something is
there, narrow ones leave open what (Chen 2023, "On the Importance of Noise Scheduling for Diffusion
Models", arXiv:2301.10972, on scaling the input for the same reason).
"""
POSTERIOR_STD = 0.03
"""Standard deviation of the posterior, in standard deviations of the latents."""
NOISE_STD = 0.2
"""While training, noise of 0 to this is added to the latents, in the same units."""
WHITENESS_WEIGHT = 0.1
CROWD_STDS = (1.6, 0.4, 0.5, 0.4)
"""The same for crowded scenes (`--stds`), whose small objects the noise hides sooner.

Through the noise of the lowest timesteps their colours must still be seen, or no word can be taught
where they are.
"""


def drawn(count: int, seed: str, *, size: int, crowds: float, pictures: float) -> Tensor:
    """Rendered scenes in [-1, 1], shares of them crowded or of little pictures.

    Some of the others overlap, as users' own may.
    """
    rng = random.Random(seed)
    scenes: list[worlds.AnyScene] = [
        sample_pictures(rng)
        if pictures and rng.random() < pictures
        else sample_crowd(rng)
        if crowds and rng.random() < crowds
        else sample_scene(rng, overlap=rng.choice((0.0, 0.5)))
        for _ in range(count)
    ]
    return worlds.pixels(scenes, size).contiguous(memory_format=torch.channels_last)


def build(channels: Sequence[int], size: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=size,
        scaling_factor=SCALING_FACTOR,
    )


@torch.no_grad()
def psnr(vae: AutoencoderKL, held_out: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB (range 2)."""
    decoded = vae.decode(vae.encode(held_out).latent_dist.mode()).sample.clamp(-1, 1)
    errors = (decoded - held_out).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / errors)).mean())


@torch.no_grad()
def read_back(vae: AutoencoderKL, size: int) -> float:
    """Percentage of held-out scenes whose colours and shapes survive encoding and decoding."""
    scenes = list(sample_scenes(100, seed=VALIDATION_SEED))
    pixels = np.stack([render_array(scene, size) for scene in scenes])
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = vae.decode(vae.encode(values).latent_dist.mode()).sample.clamp(-1, 1)
    images = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    found = [
        sorted((seen.color, seen.shape) for seen in detect(Image.fromarray(image)))
        for image in images
    ]
    truth = [sorted(thing.kind for thing in scene.objects) for scene in scenes]
    return 100 * sum(bool(same) for same in map(eq, found, truth)) / len(scenes)


def correlations(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean per channel and covariance of the channels, over pictures and places."""
    flat = latents.permute(1, 0, 2, 3).flatten(1)
    mean = flat.mean(dim=1)
    centered = flat - mean[:, None]
    return mean, centered @ centered.T / flat.shape[1]


@torch.no_grad()
def whiten(vae: AutoencoderKL, held_out: Tensor, units: Tensor) -> None:
    """Exchange the basis of the latents for an uncorrelated one of the given deviations.

    The change is linear, so the 1x1 convolutions before and after the latents take it up, and what
    is decoded stays the same.
    """
    latents = [vae.encode(part).latent_dist.mode() for part in held_out.split(64)]
    mean, covariance = correlations(torch.cat(latents))
    values, vectors = torch.linalg.eigh(covariance)
    whitening = units[:, None] * (vectors @ torch.diag(values.rsqrt()) @ vectors.T)
    before, after = vae.quant_conv, vae.post_quant_conv
    read, written = before.weight[:4].flatten(1), after.weight.flatten(1)
    after.bias.copy_(after.bias + written @ mean)
    after.weight.copy_((written @ torch.linalg.inv(whitening))[..., None, None])
    before.bias[:4] = whitening @ (before.bias[:4] - mean)
    before.weight[:4] = (whitening @ read)[..., None, None]
    before.weight[4:] = 0.0
    before.bias[4:] = 2 * (POSTERIOR_STD * units).log()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", type=Path, default=Path("runs/shapes-vae"))
    parser.add_argument("--output", type=Path, default=Path("runs/shapes/vae"))
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--crowds", type=float, default=0.0, help="share of crowded scenes")
    parser.add_argument("--pictures", type=float, default=0.0, help="share of little pictures")
    parser.add_argument("--stds", type=float, nargs=4, default=LATENT_STDS)
    parser.add_argument(
        "--squared", type=float, default=1.0, help="weight of the squared error beside the absolute"
    )
    parser.add_argument(
        "--decoder", action="store_true", help="train the decoder alone: latents stay as they are"
    )
    parser.add_argument("--warm-start", type=Path, help="a diffusers folder to go on from")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    draw = partial(drawn, size=options.size, crowds=options.crowds, pictures=options.pictures)
    units = torch.tensor(options.stds) / SCALING_FACTOR
    vae = build(options.channels, options.size)
    if options.warm_start is not None:
        vae = AutoencoderKL.from_pretrained(options.warm_start)
        vae.register_to_config(scaling_factor=SCALING_FACTOR, sample_size=options.size)
        if not options.decoder:
            whiten(vae, draw(1024, "vae/whiten"), units)
    vae = vae.to(memory_format=torch.channels_last)
    vae.requires_grad_(True)
    if options.decoder:
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    run = Run(options.run, {"vae": vae}, steps=options.steps, lr=options.lr, ema_decay=0.99)
    held_out = draw(64, f"vae/{VALIDATION_SEED}")
    while run.step < options.steps:
        batch = draw(options.batch, f"vae/{run.step}")
        torch.manual_seed(run.step)
        latents = vae.encode(batch).latent_dist.mode()
        mean, covariance = correlations(latents / units.view(1, 4, 1, 1))
        whiteness = mean.square().mean() + (covariance - torch.eye(4)).square().mean()
        spread = NOISE_STD * units.view(1, 4, 1, 1) * torch.rand(len(batch), 1, 1, 1)
        decoded = vae.decode(latents + spread * torch.randn_like(latents)).sample
        error = F.l1_loss(decoded, batch) + options.squared * F.mse_loss(decoded, batch)
        run.update(error + WHITENESS_WEIGHT * whiteness)
        if run.step % 200 == 0 or run.step == options.steps:
            run.swap_average()
            run.log(
                error=round(error.item(), 4),
                whiteness=round(whiteness.item(), 4),
                psnr=round(psnr(vae, held_out), 2),
                read_back=read_back(vae, options.size),
            )
            run.swap_average()
            run.save()
    run.swap_average()
    if not options.decoder:
        whiten(vae, draw(1024, "vae/whiten"), units)
    vae.save_pretrained(options.output)
    print(json.dumps({"psnr": psnr(vae, held_out), "read_back": read_back(vae, options.size)}))


if __name__ == "__main__":
    main()
