"""Measure on held-out crowded scenes whether a text turns the model to what it names.

    python tools/shapes/measure_crowds.py --model runs/shapes-many --items 200

Each scene has five to nine objects. One is asked about; by its colour alone, its shape alone, or
both, always so that the words fit it and no other object. Layers and taps are chosen on validation
scenes, the figures are of held-out ones; layers that the grounding loss touched and the others are
reported apart.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import worlds
from grounding import GROUNDED_LAYERS
from measure import DRAWS, ERROR_TIMESTEPS, dilated
from torch import Tensor
from torch.nn import functional as F
from training import HELD_OUT_SEED, VALIDATION_SEED

from diffenc import DiffusionEncoder, EncoderConfig
from diffenc.denoiser.attention import cross_attention_layers, word_token_positions
from diffenc.inputs.images import to_pixel_values
from diffenc.inputs.latents import encode_latents
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.models import load_backbone
from diffenc.models.base import Backbone
from diffenc.models.shapes import SHAPES_TAPS
from diffenc.passes.forward import read_attention
from diffenc.scorer import denoising_scores
from diffenc.shapes.captions import RELATION_PHRASES, noun_phrase
from diffenc.shapes.crowds import sample_crowd
from diffenc.shapes.pictures import sample_pictures
from diffenc.shapes.scenes import COLORS, SHAPES, Color, Scene, SceneObject, Shape
from diffenc.studies.focus import contrast

TIMESTEPS = (50, 300)
TAPS = tuple(
    f"{stage}.attentions.{index}"
    for stage, count in (
        ("down_blocks.2", 1),
        ("mid_block", 1),
        *((f"up_blocks.{i}", 2) for i in range(3)),
    )
    for index in range(count)
)
BATCH = 25

Naming = Callable[[Any], str]
"""Words for a `SceneObject` or a `Thing`."""
NAMINGS: dict[str, Naming] = {
    "noun": lambda thing: f"the {thing.noun}",
    "color": lambda thing: f"the {thing.color} object",
    "shape": lambda thing: f"the {thing.shape}",
    "both": lambda thing: f"the {thing.color} {thing.shape}",
}


@dataclass(frozen=True)
class Asked:
    """A scene, an object of it and another one that the same kind of words names."""

    scene: worlds.AnyScene
    target: int
    control: int

    def things(self) -> tuple[Any, Any]:
        return self.scene.objects[self.target], self.scene.objects[self.control]


def unique(scene: worlds.AnyScene, naming: str) -> list[int]:
    """Objects that the words of this kind fit alone."""
    words = [NAMINGS[naming](thing) for thing in scene.objects]
    return [index for index, text in enumerate(words) if words.count(text) == 1]


def asked_scenes(count: int, seed: int, naming: str) -> list[Asked]:
    """Scenes with two objects that words of this kind name; one is asked about.

    A noun alone names little pictures, all other words objects of crowded scenes.
    """
    rng = random.Random(f"asked/{naming}/{seed}")
    drawn: list[Asked] = []
    while len(drawn) < count:
        scene = sample_pictures(rng) if naming == "noun" else sample_crowd(rng)
        names = unique(scene, naming)
        if len(names) > 1:
            drawn.append(Asked(scene, *rng.sample(names, 2)))
    return drawn


def latents_of(backbone: Backbone, scenes: Sequence[worlds.AnyScene]) -> Tensor:
    size = backbone.vae.config.sample_size
    images = [worlds.image(scene, size) for scene in scenes]
    parts = [
        encode_latents(backbone.vae, to_pixel_values(images[start : start + 64], size=size))
        for start in range(0, len(images), 64)
    ]
    return torch.cat(parts)


def noised(backbone: Backbone, latents: Tensor, timestep: int) -> Tensor:
    channels, height, width = latents.shape[1:]
    noise = shared_noise((channels, height, width), seed=0, timestep=timestep)
    return add_noise(backbone.scheduler, latents, noise, timestep)


@torch.no_grad()
def maxima(
    backbone: Backbone, trials: list[Asked], naming: str, word_of: Naming
) -> dict[tuple[str, int], float]:
    """Per layer and timestep the percentage of maxima of a word's map that lie on its object."""
    size = backbone.vae.config.sample_size
    latents = latents_of(backbone, [item.scene for item in trials])
    layers = cross_attention_layers(backbone.unet)
    hits: Counter[tuple[str, int]] = Counter()
    for start in range(0, len(trials), BATCH):
        part = trials[start : start + BATCH]
        things = [item.things()[0] for item in part]
        texts = [NAMINGS[naming](thing) for thing in things]
        spans = [
            word_token_positions(backbone.tokenizer, text, word_of(thing))
            for text, thing in zip(texts, things, strict=True)
        ]
        positions = sorted({position for span in spans for position in span})
        embeds = backbone.embed(texts, size=(size, size))
        allowed = [dilated(worlds.seen(item.scene, size)[item.target]) for item in part]
        for timestep in TIMESTEPS:
            noisy = noised(backbone, latents[start : start + BATCH], timestep)
            read = read_attention(backbone, noisy, timestep, embeds, positions, layers)
            for layer, maps in read.items():
                for row, span in enumerate(spans):
                    own = maps[row, [positions.index(position) for position in span]].mean(dim=0)
                    hits[layer, timestep] += peaks_on(own, allowed[row])
    return {
        (layer, timestep): round(100 * hits[layer, timestep] / len(trials), 1)
        for layer in layers
        for timestep in TIMESTEPS
    }


def peaks_on(values: Tensor, allowed: np.ndarray) -> bool:
    """Whether the largest cell of a map has its middle on what is allowed (pixels)."""
    side = values.shape[-1]
    y, x = (int((cell + 0.5) * len(allowed) / side) for cell in divmod(int(values.argmax()), side))
    return bool(allowed[y, x])


@torch.no_grad()
def gathered_maxima(
    encoder: DiffusionEncoder,
    trials: list[Asked],
    naming: str,
    word_of: Naming,
) -> float:
    """The same for the maps that `word_tokens` has by default, all its layers joined."""
    size = encoder.backbone.vae.config.sample_size
    hits = 0
    for start in range(0, len(trials), BATCH):
        part = trials[start : start + BATCH]
        things = [item.things()[0] for item in part]
        words = list(dict.fromkeys(word_of(thing) for thing in things))
        maps = encoder.word_tokens(
            [worlds.image(item.scene, size) for item in part],
            [NAMINGS[naming](thing) for thing in things],
            words,
        ).maps
        for row, (item, thing) in enumerate(zip(part, things, strict=True)):
            allowed = dilated(worlds.seen(item.scene, size)[item.target])
            hits += peaks_on(maps[row, words.index(word_of(thing))], allowed)
    return round(100 * hits / len(trials), 1)


@torch.no_grad()
def changes(
    encoder: DiffusionEncoder, trials: list[Asked], naming: str
) -> dict[str, dict[str, float]]:
    """Per tap: change under the text, inside the object over outside; under a control text too."""
    size = encoder.backbone.vae.config.sample_size
    images = [worlds.image(item.scene, size) for item in trials]
    insides = [
        torch.from_numpy(worlds.seen(item.scene, size)[item.target]).float() for item in trials
    ]
    ratios: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for start in range(0, len(trials), BATCH):
        rows = slice(start, start + BATCH)
        for turn in (0, 1):
            texts = [NAMINGS[naming](item.things()[turn]) for item in trials[rows]]
            cond = encoder.extract(images[rows], texts, conditioning="cond")
            plain = encoder.extract(images[rows], texts, conditioning="uncond")
            for tap, maps in cond.items():
                change = (maps - plain[tap]).abs().mean(dim=1)
                logs = contrast(change, torch.stack(insides[rows]), "change")
                ratios.setdefault(tap, ([], []))[turn].append(logs)
    table = {}
    for tap, (asked_logs, control_logs) in ratios.items():
        own, other = torch.cat(asked_logs), torch.cat(control_logs)
        table[tap] = {
            "asked": round(float(own.mean().exp()), 2),
            "control": round(float(other.mean().exp()), 2),
            "won_percent": round(100 * float((own > other).float().mean()), 1),
        }
    return table


@torch.no_grad()
def one_token(
    encoder: DiffusionEncoder,
    trials: list[Asked],
    naming: str,
    word_of: Naming,
) -> dict[str, dict[str, float]]:
    """How often a linear layer names the asked trait of one token, per tap, in percent.

    Two thirds of the scenes fit the layer. The token is the mean of all cells, that of the word, or
    the mean over the object's true mask; features are those under the text.
    """
    size = encoder.backbone.vae.config.sample_size
    trait = SHAPES if naming == "color" else COLORS
    labels = torch.tensor(
        [
            trait.index(thing.shape if naming == "color" else thing.color)
            for thing in (item.things()[0] for item in trials)
        ]
    )
    tokens: dict[tuple[str, str], list[Tensor]] = {}
    for start in range(0, len(trials), BATCH):
        part = trials[start : start + BATCH]
        images = [worlds.image(item.scene, size) for item in part]
        things = [item.things()[0] for item in part]
        texts = [NAMINGS[naming](thing) for thing in things]
        words = list(dict.fromkeys(word_of(thing) for thing in things))
        gathered = encoder.word_tokens(images, texts, words)
        own = torch.tensor([words.index(word_of(thing)) for thing in things])
        shares = gathered.maps[torch.arange(len(part)), own]
        for tap, maps in gathered.features.items():
            grid = (maps.shape[-2], maps.shape[-1])
            word_map = F.interpolate(shares[:, None], grid, mode="area")[:, 0]
            truth = F.adaptive_avg_pool2d(
                torch.stack(
                    [torch.from_numpy(worlds.seen(i.scene, size)[i.target]).float() for i in part]
                ),
                grid,
            )
            for name, weights in (
                ("mean", torch.ones_like(truth)),
                ("word", word_map),
                ("mask", truth),
            ):
                total = weights.sum(dim=(1, 2))[:, None]
                token = (maps * weights[:, None]).sum(dim=(2, 3)) / total
                tokens.setdefault((tap, name), []).append(token)
    table: dict[str, dict[str, float]] = {}
    for (tap, name), rows in tokens.items():
        table.setdefault(tap, {})[name] = readout(torch.cat(rows), labels, len(trait))
    return table


def readout(tokens: Tensor, labels: Tensor, classes: int) -> float:
    """Percentage right of a linear layer with weight decay, on the last third."""
    kept = len(tokens) * 2 // 3
    with torch.enable_grad():
        values = tokens.float()
        mean, std = values[:kept].mean(dim=0), values[:kept].std(dim=0).clamp(min=1e-6)
        values = (values - mean) / std
        torch.manual_seed(0)
        head = torch.nn.Linear(values.shape[1], classes)
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.02, weight_decay=0.3)
        for _ in range(300):
            optimizer.zero_grad()
            F.cross_entropy(head(values[:kept]), labels[:kept]).backward()
            optimizer.step()
    right = head(values[kept:]).argmax(dim=1) == labels[kept:]
    return round(100 * float(right.float().mean()), 1)


Pair = tuple[tuple[worlds.AnyScene, worlds.AnyScene], tuple[str, str]]
DrawPair = Callable[[random.Random, str], Pair]
Kinds = tuple[str, ...]
KINDS: Kinds = ("noun", "color", "relation")


def crowd_pair(rng: random.Random, kind: str) -> Pair:
    """Two crowded scenes that differ in what two captions say of two of their objects."""
    while True:
        scene = sample_crowd(rng)
        names = unique(scene, "both")
        if len(names) < 2:
            continue
        first, second = rng.sample(names, 2)
        a, b = scene.objects[first], scene.objects[second]
        relation = scene.relation(first, second)
        if relation is None or a.color == b.color or a.shape == b.shape:
            continue
        objects = list(scene.objects)
        match kind:
            case "noun":
                objects[first] = _another(rng, a, scene)
            case "color":
                objects[first], objects[second] = (
                    replace(a, color=b.color),
                    replace(b, color=a.color),
                )
            case _:
                objects[first] = replace(a, color=b.color, shape=b.shape)
                objects[second] = replace(b, color=a.color, shape=a.shape)
        other = replace(scene, objects=tuple(objects))
        lines = (_said(scene, first, second, relation), _said(other, first, second, relation))
        members = {thing.kind for thing in other.objects}
        kept = {objects[first].kind, objects[second].kind}
        alone = all(sum(thing.kind == kind for thing in other.objects) == 1 for kind in kept)
        apart = kind == "relation" or not {a.kind, b.kind} <= members
        if alone and apart and lines[0] != lines[1]:
            return (scene, other), lines


def _another(rng: random.Random, thing: SceneObject, scene: Scene) -> SceneObject:
    colors: list[Color] = [color for color in COLORS if color != thing.color]
    shapes: list[Shape] = [shape for shape in SHAPES if shape != thing.shape]
    if rng.random() < 0.5:
        return replace(thing, shape=rng.choice(shapes))
    return replace(thing, color=rng.choice(colors))


def _said(scene: Scene, first: int, second: int, relation: str) -> str:
    a, b = (
        noun_phrase(shape=thing.shape, color=thing.color)
        for thing in (scene.objects[first], scene.objects[second])
    )
    return f"{a} {RELATION_PHRASES[relation][0]} {b}"  # type: ignore[index]


def pair_scores(
    backbone: Backbone, items: int, seed: int, draw: DrawPair = crowd_pair, kinds: Kinds = KINDS
) -> dict[str, dict[str, float]]:
    """Text, image and group score in percent by denoising error, as `measure.py` has them."""
    table = {}
    for kind in kinds:
        rng = random.Random(f"crowd-pairs/{kind}/{seed}")
        hits: Counter[str] = Counter()
        for _ in range(items):
            scenes, lines = draw(rng, kind)
            latents = latents_of(backbone, list(scenes))
            draws = [
                denoising_scores(backbone, latents, lines, timesteps=ERROR_TIMESTEPS, seed=number)
                for number in range(DRAWS)
            ]
            s = torch.stack(draws).mean(dim=0)
            text = bool(s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0])
            image = bool(s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1])
            hits.update(text=text, image=image, group=text and image)
        table[kind] = {
            name: round(100 * hits[name] / items, 1) for name in ("text", "image", "group")
        }
    return table


@torch.no_grad()
def told_apart(
    backbone: Backbone, items: int, seed: int, draw: DrawPair = crowd_pair, kinds: Kinds = KINDS
) -> dict[str, dict[str, float]]:
    """How often one prediction explains the noise better under the true caption, in percent.

    Over all cells, as the text score has it, and over those alone where the two pictures of a pair
    differ: where this is the larger one, what captions change elsewhere drowns what they say.
    """
    size = backbone.vae.config.sample_size
    table = {}
    for kind in kinds:
        rng = random.Random(f"crowd-pairs/{kind}/{seed}")
        pairs = [draw(rng, kind) for _ in range(items)]
        latents = latents_of(backbone, [scene for scenes, _ in pairs for scene in scenes])
        unlike = torch.stack([differing(*scenes, size) for scenes, _ in pairs])
        unlike = F.adaptive_max_pool2d(unlike, latents.shape[-2:]).repeat_interleave(2, dim=0)
        texts = [line for _, lines in pairs for line in lines]
        others = [line for _, lines in pairs for line in lines[::-1]]
        own, other = (backbone.embed(each, size=(size, size)) for each in (texts, others))
        for timestep in ERROR_TIMESTEPS:
            channels, height, width = latents.shape[1:]
            noise = shared_noise((channels, height, width), seed=0, timestep=timestep)
            noisy = add_noise(backbone.scheduler, latents, noise, timestep)
            right, wrong = (
                (backbone.unet(noisy, timestep, each.prompt_embeds).sample - noise).square()
                for each in (own, other)
            )
            gain = (wrong - right).mean(dim=1)
            over_all = gain.mean(dim=(1, 2)) > 0
            there = (gain * unlike).sum(dim=(1, 2)) > 0
            table[f"{kind}, t = {timestep}"] = {
                "all cells": round(100 * float(over_all.float().mean()), 1),
                "where pictures differ": round(100 * float(there.float().mean()), 1),
            }
    return table


def differing(scene: worlds.AnyScene, other: worlds.AnyScene, size: int) -> Tensor:
    """Pixels (size size) on which an object of one scene lies that the other does not have."""
    changed = [
        index
        for index, (a, b) in enumerate(zip(scene.objects, other.objects, strict=True))
        if a != b
    ]
    seen = [torch.from_numpy(worlds.seen(each, size)[changed]).float() for each in (scene, other)]
    return torch.cat(seen).amax(dim=0)


def of_best(
    validation: dict[tuple[str, int], float], held_out: dict[tuple[str, int], float]
) -> dict[str, object]:
    """The layer that is best on validation scenes, its figure on held-out ones; both groups."""
    table: dict[str, object] = {}
    for name, taught in (("taught", True), ("untouched", False)):
        places = [p for p in validation if p[0].startswith(GROUNDED_LAYERS) == taught]
        best = max(places, key=lambda place: validation[place])
        table[name] = {"layer": best[0], "timestep": best[1], "percent": held_out[best]}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--items", type=int, default=200, help="scenes per kind of words")
    parser.add_argument("--pairs", type=int, default=50, help="pairs of scenes per kind; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/crowds.json"))
    parser.add_argument("--validation", action="store_true", help="look at validation scenes alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    backbone = load_backbone(options.model)
    seed = VALIDATION_SEED if options.validation else HELD_OUT_SEED
    words: dict[str, tuple[str, Naming]] = {
        "shape word": ("shape", lambda thing: thing.shape),
        "color word": ("color", lambda thing: thing.color),
        "the red object": ("color", lambda _: "object"),
        "noun of two words": ("both", lambda thing: thing.shape),
    }
    table: dict[str, object] = {}
    for label, (naming, word_of) in words.items():
        chosen = maxima(
            backbone, asked_scenes(options.items // 2, VALIDATION_SEED, naming), naming, word_of
        )
        trials = asked_scenes(options.items, seed, naming)
        shown = maxima(backbone, trials, naming, word_of)
        encoder = DiffusionEncoder(backbone, EncoderConfig(taps=SHAPES_TAPS))
        figures = {
            **of_best(chosen, shown),
            "word_tokens": gathered_maxima(encoder, trials, naming, word_of),
        }
        table[f"maximum on its object: {label}"] = figures
        print(label, json.dumps(figures), flush=True)
    for timestep in TIMESTEPS:
        encoder = DiffusionEncoder(
            backbone, EncoderConfig(taps=TAPS, timestep=timestep, batch_size=BATCH)
        )
        for naming in ("color", "shape"):
            name = f"change, {naming}, t = {timestep}"
            table[name] = changes(encoder, asked_scenes(options.items, seed, naming), naming)
            print(name, json.dumps(table[name]), flush=True)
        for naming, word in (("color", "object"), ("shape", None)):
            name = f"one token, {naming}, t = {timestep}"
            table[name] = one_token(
                encoder,
                asked_scenes(3 * options.items, seed, naming),
                naming,
                lambda thing, word=word: word or thing.shape,  # type: ignore[misc]
            )
            print(name, json.dumps(table[name]), flush=True)
    if options.pairs:
        table["pairs"] = pair_scores(backbone, options.pairs, seed)
        print("pairs", json.dumps(table["pairs"]), flush=True)
        table["told apart by one prediction"] = told_apart(backbone, options.pairs, seed)
        print("told apart", json.dumps(table["told apart by one prediction"]), flush=True)
    table["seconds"] = round(time.monotonic() - started)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
