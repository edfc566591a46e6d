"""Draw what the bundled diffusion model makes of words: generated pictures, and attention maps.

    python tools/shapes/make_model_sheets.py

Captions and scenes are the first of held-out seeds, none chosen; the layer and the timestep of the
maps are those that the model's card names.
"""

import argparse
import random
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from measure import pixel_values, plain_caption, two_object_scenes
from PIL import Image
from training import HELD_OUT_SEED

from diffenc.inputs.latents import encode_latents
from diffenc.models import load_backbone
from diffenc.models.shapes import shapes_folder
from diffenc.scorer import word_maps
from diffenc.shapes.captions import caption
from diffenc.shapes.render import render
from diffenc.shapes.scenes import sample_scene
from diffenc.viz import HeatMap, Panel, figure

SIDE = 192


def generated(folder: Path, count: int) -> Image.Image:
    """Pictures of the stock pipeline, five in a row, with their captions."""
    rng = random.Random(f"sheet/{HELD_OUT_SEED}")
    texts = [caption(sample_scene(rng), rng) for _ in range(count)]
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        texts,
        guidance_scale=4.0,
        num_inference_steps=30,
        generator=torch.Generator().manual_seed(0),
    ).images
    panels = [Panel(image, caption=text) for image, text in zip(images, texts, strict=True)]
    return figure([panels[start : start + 5] for start in range(0, count, 5)], side=SIDE)


def attention(folder: Path, count: int, layer: str, timestep: int) -> Image.Image:
    """Per scene a row: the picture, and the maps of both colour words and both shape words."""
    backbone = load_backbone(folder)
    rows = []
    for scene in two_object_scenes(count, f"sheet/{HELD_OUT_SEED}"):
        text = plain_caption(scene)
        words = [word for thing in scene.objects for word in (thing.color, thing.shape)]
        latents = encode_latents(backbone.vae, pixel_values([scene]))
        with torch.no_grad():
            maps = word_maps(
                backbone, latents, text, words, timesteps=(timestep,), layers=(layer,)
            )[0]
        picture = render(scene)
        rows.append(
            [
                Panel(picture, caption=text),
                *(
                    Panel(HeatMap(found).to_pil(SIDE, overlay=picture), caption=f'"{word}"')
                    for word, found in zip(words, maps, strict=True)
                ),
            ]
        )
    return figure(rows, side=SIDE)


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=shapes_folder())
    parser.add_argument("--layer", default="up_blocks.2.attentions.0")
    parser.add_argument("--timestep", type=int, default=189)
    parser.add_argument("--output", type=Path, default=Path("docs/assets"))
    options = parser.parse_args()
    save(generated(options.model, 10), options.output / "shapes-generated.png")
    maps = attention(options.model, 5, options.layer, options.timestep)
    save(maps, options.output / "shapes-attention.png")


if __name__ == "__main__":
    main()
