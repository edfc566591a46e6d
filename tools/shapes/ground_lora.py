"""Whether LoRA alone grounds the colour words of `shapes`, which its training left to themselves.

    python tools/shapes/ground_lora.py --steps 400

LoRA on the cross-attentions learns from a loss on the maps of named words, after TokenCompose, and
from denoising; the U-Net's own weights stay. Measured before and after, on held-out scenes of three
objects of three colours and three shapes, by the functions of `measure_crowds.py`.
"""

import argparse
import json
import random
import time
from functools import partial
from pathlib import Path

import torch
from crowd_texts import crowd_text
from grounding import GROUNDED_LAYERS, outside, spoken_of
from measure_crowds import BATCH, TAPS, Asked, changes, maxima, of_best, one_token
from torch.nn import functional as F
from train_clip import pixels
from train_denoiser import covered, draw_timesteps, encode
from training import HELD_OUT_SEED, VALIDATION_SEED

from diffenc import DiffusionEncoder, EncoderConfig
from diffenc.denoiser.attention import CrossAttnTaps
from diffenc.models import load_backbone
from diffenc.shapes.scenes import COLORS, SHAPES, Scene, SceneObject, sample_scene


def scene_of_three(rng: random.Random) -> Scene:
    """Three objects that differ in colour and in shape, so that one trait names each."""
    kinds = list(zip(rng.sample(COLORS, 3), rng.sample(SHAPES, 3), strict=True))
    return sample_scene(rng, kinds=kinds)


def asked_of(count: int, seed: int) -> list[Asked]:
    rng = random.Random(f"ground-lora/{seed}")
    return [Asked(scene_of_three(rng), *rng.sample(range(3), 2)) for _ in range(count)]


def _word(word: str, thing: SceneObject) -> str:
    """The object's own colour or shape, or the word itself."""
    own: str = getattr(thing, word, word)
    return own


def measured(encoder: DiffusionEncoder, items: int) -> dict[str, object]:
    table: dict[str, object] = {}
    for naming, word in (("color", "color"), ("color", "object"), ("shape", "shape")):
        chosen, shown = (
            maxima(
                encoder.backbone,
                asked_of(count, seed),
                naming,
                partial(_word, word),
            )
            for count, seed in ((items // 2, VALIDATION_SEED), (items, HELD_OUT_SEED))
        )
        table[f"maximum on its object, {naming}, by {word}"] = of_best(chosen, shown)
    table["change, color"] = changes(encoder, asked_of(items, HELD_OUT_SEED), "color")
    table["one token, color"] = one_token(
        encoder, asked_of(3 * items, HELD_OUT_SEED), "color", lambda _: "object"
    )
    table["one token, color, by its word"] = one_token(
        encoder, asked_of(3 * items, HELD_OUT_SEED), "color", lambda thing: thing.color
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight", type=float, default=1.0, help="of the loss on the maps")
    parser.add_argument("--low", type=float, default=0.6, help="share of low timesteps")
    parser.add_argument("--clear", type=float, default=6.0)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/ground-lora"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    backbone = load_backbone("shapes")
    encoder = DiffusionEncoder(backbone, EncoderConfig(taps=TAPS, timestep=50, batch_size=BATCH))
    options.output.mkdir(parents=True, exist_ok=True)
    results = {"before": measured(encoder, options.items)}
    print(json.dumps(results["before"]), flush=True)
    encoder.add_lora(rank=options.rank)
    optimizer = torch.optim.AdamW(encoder.trainable_parameters(), lr=options.lr, weight_decay=0)
    alphas = backbone.scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    rng = random.Random("ground-lora/train")
    started = time.monotonic()
    encoder.train()
    for step in range(options.steps):
        scenes = [scene_of_three(rng) for _ in range(options.batch)]
        texts = [crowd_text(scene, rng) for scene in scenes]
        latents = encode(backbone.vae, pixels(scenes))
        side = latents.shape[-1]
        shares = torch.stack([covered(scene, 64, side, 3) for scene in scenes]).float() / 255
        bits = torch.tensor(
            [
                spoken_of(backbone.tokenizer, text, scene, colors=True)
                for text, scene in zip(texts, scenes, strict=True)
            ]
        )
        generator = torch.Generator().manual_seed(step)
        timesteps = draw_timesteps(options.batch, generator, low=options.low)
        noise = torch.randn(latents.shape, generator=generator)
        signal = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        with torch.no_grad():
            states = backbone.embed(texts, size=(64, 64)).prompt_embeds
        with CrossAttnTaps(backbone.unet, GROUNDED_LAYERS, tokens=range(bits.shape[1])) as taps:
            predicted = backbone.unet(noisy, timesteps, states).sample
        weights = (snr[timesteps] / options.clear).clamp(max=1)
        astray = outside(taps.maps(), shares, bits, weights)
        loss = F.mse_loss(predicted, noise) + options.weight * astray
        optimizer.param_groups[0]["lr"] = options.lr * (1 - step / options.steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 24:
            seconds = round(time.monotonic() - started)
            print(
                json.dumps({"step": step + 1, "seconds": seconds, "astray": astray.item()}),
                flush=True,
            )
    encoder.eval()
    encoder.save_lora(options.output / "lora")
    results["after"] = measured(encoder, options.items)
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["after"]), flush=True)


if __name__ == "__main__":
    main()
