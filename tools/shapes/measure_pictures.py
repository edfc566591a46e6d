"""Measure on held-out scenes of little pictures whether a text turns the model to what it names.

    python tools/shapes/measure_pictures.py --model runs/shapes-many --items 200

The pictures are those of training, their scenes are not. Layers are chosen on validation scenes;
those that the grounding loss touched and the others are reported apart.
"""

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
import worlds
from measure_crowds import (
    BATCH,
    TAPS,
    TIMESTEPS,
    Naming,
    Pair,
    asked_scenes,
    changes,
    gathered_maxima,
    maxima,
    of_best,
    pair_scores,
    told_apart,
)
from train_vae import psnr
from training import HELD_OUT_SEED, VALIDATION_SEED

from diffenc import DiffusionEncoder, EncoderConfig
from diffenc.models import load_backbone
from diffenc.models.shapes import SHAPES_TAPS
from diffenc.shapes.captions import RELATION_PHRASES, with_article
from diffenc.shapes.pictures import NOUNS, PictureScene, sample_picture_scenes, sample_pictures

KINDS = ("noun", "relation")
NOUN: Naming = lambda thing: str(thing.noun)  # noqa: E731  # as its siblings in NAMINGS


def picture_pair(rng: random.Random, kind: str) -> Pair:
    """Two scenes that differ in one thing, or in which two things change places, and captions."""
    while True:
        scene = sample_pictures(rng)
        names = [thing.noun for thing in scene.objects]
        alone = [index for index, noun in enumerate(names) if names.count(noun) == 1]
        if len(alone) < 2:
            continue
        first, second = rng.sample(alone, 2)
        relation = scene.relation(first, second)
        if relation is None:
            continue
        objects = list(scene.objects)
        if kind == "noun":
            another = rng.choice([noun for noun in NOUNS if noun not in names])
            objects[first] = replace(objects[first], noun=another)
        else:
            objects[first] = replace(objects[first], noun=names[second])
            objects[second] = replace(objects[second], noun=names[first])
        other = replace(scene, objects=tuple(objects))
        said = RELATION_PHRASES[relation][0]
        lines = [_line(each, first, second, said) for each in (scene, other)]
        return (scene, other), (lines[0], lines[1])


def _line(scene: PictureScene, first: int, second: int, said: str) -> str:
    a, b = (with_article(scene.objects[index].noun) for index in (first, second))
    return f"{a} {said} {b}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--items", type=int, default=200, help="scenes")
    parser.add_argument("--pairs", type=int, default=50, help="pairs of scenes per kind; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/pictures.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    backbone = load_backbone(options.model)
    table: dict[str, object] = {}

    def report(name: str, figures: object) -> None:
        table[name] = figures
        print(name, json.dumps(figures), flush=True)

    held_out = list(sample_picture_scenes(32, seed=HELD_OUT_SEED))
    size = backbone.vae.config.sample_size
    report("PSNR of the VAE in dB", round(psnr(backbone.vae, worlds.pixels(held_out, size)), 2))
    chosen = maxima(
        backbone, asked_scenes(options.items // 2, VALIDATION_SEED, "noun"), "noun", NOUN
    )
    trials = asked_scenes(options.items, HELD_OUT_SEED, "noun")
    encoder = DiffusionEncoder(backbone, EncoderConfig(taps=SHAPES_TAPS))
    report(
        "maximum on its thing",
        {
            **of_best(chosen, maxima(backbone, trials, "noun", NOUN)),
            "word_tokens": gathered_maxima(encoder, trials, "noun", NOUN),
        },
    )
    for timestep in TIMESTEPS:
        encoder = DiffusionEncoder(
            backbone, EncoderConfig(taps=TAPS, timestep=timestep, batch_size=BATCH)
        )
        report(f"change, t = {timestep}", changes(encoder, trials, "noun"))
    if options.pairs:
        measured = (backbone, options.pairs, HELD_OUT_SEED, picture_pair, KINDS)
        report("pairs", pair_scores(*measured))
        report("told apart by one prediction", told_apart(*measured))
    report("seconds", round(time.monotonic() - started))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
