"""Train the autoencoder of the miniature model: L1 and a little KL on rendered scenes.

    python tools/shapes/train_vae.py --steps 2500

Resumable: started again, it goes on from `--run`. Writes a diffusers folder to `--output`.
"""

import argparse
import json
import random
from operator import eq
from pathlib import Path

import numpy as np
import torch
from detector import detect
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from training import HELD_OUT_SEED, Run

from diffenc.shapes.render import render_array
from diffenc.shapes.scenes import sample_scene, sample_scenes

# More lets the posterior's noise drown the signal: at 1e-5 its deviation exceeded the means', and
# one reconstruction in five had a wrong colour or shape.
KL_WEIGHT = 1e-7


def pictures(count: int, seed: str) -> Tensor:
    """Rendered scenes in [-1, 1]; some overlap, as users' own scenes may."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng, overlap=rng.choice((0.0, 0.5))) for _ in range(count)]
    pixels = np.stack([render_array(scene) for scene in scenes])
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return values.contiguous(memory_format=torch.channels_last)


def build() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )


@torch.no_grad()
def psnr(vae: AutoencoderKL, held_out: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB (range 2)."""
    decoded = vae.decode(vae.encode(held_out).latent_dist.mode()).sample.clamp(-1, 1)
    errors = (decoded - held_out).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / errors)).mean())


@torch.no_grad()
def read_back(vae: AutoencoderKL) -> float:
    """Percentage of held-out scenes whose colours and shapes survive encoding and decoding."""
    scenes = list(sample_scenes(100, seed=HELD_OUT_SEED))
    pixels = np.stack([render_array(scene) for scene in scenes])
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = vae.decode(vae.encode(values).latent_dist.mode()).sample.clamp(-1, 1)
    images = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    found = [
        sorted((seen.color, seen.shape) for seen in detect(Image.fromarray(image)))
        for image in images
    ]
    truth = [sorted(thing.kind for thing in scene.objects) for scene in scenes]
    return 100 * sum(bool(same) for same in map(eq, found, truth)) / len(scenes)


@torch.no_grad()
def scaling_factor(vae: AutoencoderKL) -> float:
    """1 / standard deviation of the latents, so that noise and signal have one scale."""
    latents = vae.encode(pictures(512, "vae/scale")).latent_dist.mode()
    return float(1 / latents.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", type=Path, default=Path("runs/shapes-vae"))
    parser.add_argument("--output", type=Path, default=Path("runs/shapes/vae"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vae = build().to(memory_format=torch.channels_last)
    run = Run(options.run, {"vae": vae}, steps=options.steps, lr=2e-3, ema_decay=0.99)
    held_out = pictures(64, f"vae/{HELD_OUT_SEED}")
    while run.step < options.steps:
        batch = pictures(options.batch, f"vae/{run.step}")
        torch.manual_seed(run.step)
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch)
        run.update(error + KL_WEIGHT * posterior.kl().mean())
        if run.step % 200 == 0 or run.step == options.steps:
            run.swap_average()
            run.log(
                error=round(error.item(), 4),
                psnr=round(psnr(vae, held_out), 2),
                read_back=read_back(vae),
            )
            run.swap_average()
            run.save()
    run.swap_average()
    vae.register_to_config(scaling_factor=round(scaling_factor(vae), 5))
    vae.save_pretrained(options.output)
    print(json.dumps({"psnr": psnr(vae, held_out), "scale": vae.config.scaling_factor}))


if __name__ == "__main__":
    main()
