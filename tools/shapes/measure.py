"""Measure the bundled diffusion model on held-out scenes, and print the table of its card as JSON.

    python tools/shapes/measure.py

Every scene's seed is at or above `HELD_OUT_SEED`, which no training uses.
"""

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from detector import detect
from diffusers import StableDiffusionPipeline
from einops import reduce
from PIL import Image
from torch import Tensor
from training import HELD_OUT_SEED, VALIDATION_SEED

from diffenc.denoiser.attention import cross_attention_layers, word_token_positions
from diffenc.inputs.images import to_pixel_values
from diffenc.inputs.latents import encode_latents
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.models import load_backbone
from diffenc.models.base import Backbone
from diffenc.models.shapes import shapes_folder
from diffenc.passes.forward import read_attention
from diffenc.scorer import denoising_scores
from diffenc.shapes.captions import RELATION_PHRASES, noun_phrase
from diffenc.shapes.pairs import WINOGROUND_KINDS, winoground_items
from diffenc.shapes.render import masks, render
from diffenc.shapes.scenes import Scene, sample_scene, sample_scenes

ERROR_TIMESTEPS, DRAWS = (400, 500, 600, 700, 800), 4
"""A handful of noise levels and draws at which the error tells texts apart best, on validation
scenes; `validate_timesteps.py` shows how they were chosen."""
ATTENTION_TIMESTEPS = (50, 89, 189, 389, 589)
DILATION = 2
"""Pixels by which masks are dilated: half a latent cell."""


def pixel_values(scenes: list[Scene]) -> Tensor:
    return to_pixel_values([render(scene) for scene in scenes], size=64)


@torch.no_grad()
def reconstruction(backbone: Backbone, count: int) -> dict[str, float]:
    """PSNR in dB, and the percentage of scenes that are read right after the round trip."""
    scenes = list(sample_scenes(count, seed=HELD_OUT_SEED))
    values = pixel_values(scenes)
    decoded = decode(backbone, encode_latents(backbone.vae, values))
    errors = reduce((decoded - values) ** 2, "b c h w -> b", "mean")
    right = sum(kinds(image) == truth(scene) for image, scene in zip(decoded, scenes, strict=True))
    return {
        "psnr_db": round(float((10 * torch.log10(4 / errors)).mean()), 2),
        "read_back_percent": round(100 * right / count, 1),
    }


def decode(backbone: Backbone, latents: Tensor) -> Tensor:
    decoded: Tensor = backbone.vae.decode(latents / backbone.vae.config.scaling_factor).sample
    return decoded.clamp(-1, 1)


def kinds(image: Tensor) -> Counter[tuple[str, str]]:
    pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Counter((seen.color, seen.shape) for seen in detect(Image.fromarray(pixels)))


def truth(scene: Scene) -> Counter[tuple[str, str]]:
    return Counter(thing.kind for thing in scene.objects)


def plain_caption(scene: Scene) -> str:
    """One object, or two in their relation."""
    names = [noun_phrase(shape=thing.shape, color=thing.color) for thing in scene.objects]
    if len(names) == 1:
        return names[0]
    relation = scene.relation(0, 1)
    return f"{names[0]} {RELATION_PHRASES[relation][0] if relation else 'and'} {names[1]}"


def two_object_scenes(count: int, seed: str) -> list[Scene]:
    """Scenes of two objects that differ in colour and in shape, in a clear relation."""
    rng = random.Random(seed)
    found: list[Scene] = []
    while len(found) < count:
        scene = sample_scene(rng, count=2)
        a, b = scene.objects
        if a.color != b.color and a.shape != b.shape and scene.relation(0, 1):
            found.append(scene)
    return found


def generation(folder: Path, per_kind: int) -> dict[str, float]:
    """Percentage of generated pictures with exactly the colours and shapes of the caption."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(f"generation/{HELD_OUT_SEED}")
    scenes = {
        "one_object": [sample_scene(rng, count=1) for _ in range(per_kind)],
        "two_objects": two_object_scenes(per_kind, f"generation/{HELD_OUT_SEED}"),
    }
    found = {}
    for name, members in scenes.items():
        generator = torch.Generator().manual_seed(0)
        right = 0
        for start in range(0, per_kind, 10):
            part = members[start : start + 10]
            images = pipe(
                [plain_caption(scene) for scene in part],
                guidance_scale=4.0,
                num_inference_steps=30,
                generator=generator,
            ).images
            for image, scene in zip(images, part, strict=True):
                seen = Counter((thing.color, thing.shape) for thing in detect(image))
                right += seen == truth(scene)
        found[f"{name}_percent"] = round(100 * right / per_kind, 1)
    return found


def winoground(backbone: Backbone, per_kind: int) -> dict[str, dict[str, float]]:
    """Text, image and group score in percent, by denoising error, mean over timesteps and draws."""
    table: dict[str, dict[str, float]] = {}
    for kind in WINOGROUND_KINDS:
        hits = Counter[str]()
        for item in winoground_items(per_kind, seed=HELD_OUT_SEED, kinds=[kind]):
            latents = encode_latents(backbone.vae, pixel_values(list(item.scenes)))
            draws = [
                denoising_scores(
                    backbone, latents, item.captions, timesteps=ERROR_TIMESTEPS, seed=draw
                )
                for draw in range(DRAWS)
            ]
            s = torch.stack(draws).mean(dim=0)
            text = bool(s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0])
            image = bool(s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1])
            hits.update(text=text, image=image, group=text and image)
        table[kind] = {name: round(100 * hits[name] / per_kind, 1) for name in hits}
    return table


def localisation(backbone: Backbone, count: int) -> dict[str, object]:
    """How often a shape word's map has its maximum on its object.

    Layer and timestep are the best on validation scenes; the figures are of held-out ones.
    """
    (best, _), *_ = localised(backbone, count, VALIDATION_SEED).most_common()
    hits = localised(backbone, count, HELD_OUT_SEED)
    percent = {place: round(100 * hit / (2 * count), 1) for place, hit in hits.items()}
    others = [
        {"layer": layer, "timestep": step, "percent": percent[layer, step]}
        for (layer, step), _ in hits.most_common(5)
    ]
    chosen = {"layer": best[0], "timestep": best[1], "percent": percent.get(best, 0.0)}
    return {"best": chosen, "highest": others}


def localised(backbone: Backbone, count: int, seed: int) -> Counter[tuple[str, int]]:
    """Hits per layer and timestep, of two words in each of `count` scenes."""
    scenes = two_object_scenes(count, f"attention/{seed}")
    latents = encode_latents(backbone.vae, pixel_values(scenes))
    layers = cross_attention_layers(backbone.unet)
    hits: Counter[tuple[str, int]] = Counter()
    for timestep in ATTENTION_TIMESTEPS:
        noise = shared_noise((4, 16, 16), seed=0, timestep=timestep)
        noisy = add_noise(backbone.scheduler, latents, noise, timestep)
        for row, scene in enumerate(scenes):
            text = plain_caption(scene)
            spans = [
                word_token_positions(backbone.tokenizer, text, thing.shape)
                for thing in scene.objects
            ]
            embeds = backbone.embed([text], size=(64, 64))
            flat = [position for span in spans for position in span]
            maps = read_attention(backbone, noisy[row : row + 1], timestep, embeds, flat, layers)
            allowed = [dilated(mask) for mask in masks(scene)]
            for layer, found in maps.items():
                for index, mask in enumerate(allowed):
                    side = found.shape[-1]
                    cell = int(found[0, index].argmax())
                    y, x = ((value + 0.5) * 64 / side for value in divmod(cell, side))
                    hits[layer, timestep] += bool(mask[int(y), int(x)])
    return hits


def dilated(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, DILATION)
    height, width = mask.shape
    grown: np.ndarray = np.any(
        [
            padded[y : y + height, x : x + width]
            for y in range(2 * DILATION + 1)
            for x in range(2 * DILATION + 1)
        ],
        axis=0,
    )
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=shapes_folder())
    parser.add_argument("--items", type=int, default=100, help="per kind of pair and caption")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backbone = load_backbone(options.model)
    started = time.monotonic()
    table = {
        "reconstruction": reconstruction(backbone, 2 * options.items),
        "denoising_score_percent": winoground(backbone, options.items),
        "attention": localisation(backbone, options.items),
        "generation": generation(options.model, options.items // 2),
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
