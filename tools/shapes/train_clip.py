"""Train a small CLIP on the miniature world.

    python tools/shapes/train_clip.py --hard-negatives --output runs/shapes-teacher
    python tools/shapes/train_clip.py --output runs/shapes-clip
    python tools/shapes/train_clip.py --size 96 --crowds 0.65 --start runs/shapes-clip \
        --output runs/shapes-clip-many

With hard negatives half of a batch are near twins of the other half (colours swapped, relation
turned, sizes exchanged ...): its text encoder must read word order, and becomes the diffusion
model's. Without them it is the `shapes-clip` baseline, with CLIP's known weakness in miniature.

Captions alone teach a small vision transformer colours within minutes and shapes hardly at all, so
that each patch must also tell what lies on it: alone at first, in small batches, then beside the
captions. The heads for that are thrown away.

`--start` begins from a trained one, of any size of picture: positions are drawn between those that
it knows.
"""

import argparse
import json
import math
import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from patches import truths
from texts import any_scene, near_twin, said, training_text
from torch import Tensor, nn
from torch.nn import functional as F
from training import VALIDATION_SEED, Run, mixed_precision
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffenc.shapes.captions import caption
from diffenc.shapes.pairs import WINOGROUND_KINDS, winoground_items
from diffenc.shapes.render import render_array
from diffenc.shapes.scenes import COLORS, SHAPES, SIZES, Scene

PATCH = 8
"""Side of a patch in pixels."""


class PatchReaders(nn.Module):
    """Linear heads that read shape, colour and size of what lies on each patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Linear(width, 1 + len(words)) for words in (SHAPES, COLORS, SIZES)
        )

    def forward(self, states: Tensor, truth: Tensor) -> Tensor:
        """Mean cross-entropy of the heads; patches without an object count a fifth.

        Args:
            states: Last hidden states of the vision tower (b 1+patches width).
            truth: Per patch the indices of its words, 0 for the background (b patches 3).
        """
        patches = states[:, 1:].flatten(0, 1)
        weights = torch.where(truth[..., 0] > 0, 1.0, 0.2).flatten()
        losses = [
            F.cross_entropy(head(patches), truth[..., index].flatten(), reduction="none")
            for index, head in enumerate(self.heads)
        ]
        return (torch.stack(losses).mean(dim=0) * weights).sum() / weights.sum()


def build(tokenizer: CLIPTokenizer, size: int = 64) -> CLIPModel:
    width = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4)
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    return CLIPModel(
        CLIPConfig(
            text_config=dict(
                **width,
                **special,
                pad_token_id=tokenizer.pad_token_id,
                num_hidden_layers=3,
                vocab_size=len(tokenizer),
                max_position_embeddings=tokenizer.model_max_length,
                projection_dim=128,
            ),
            vision_config=dict(
                **width, num_hidden_layers=4, image_size=size, patch_size=PATCH, projection_dim=128
            ),
            projection_dim=128,
        )
    )


def begin_from(model: CLIPModel, folder: Path) -> None:
    """Take over a trained model's weights, its positions drawn out to the new grid."""
    state = CLIPModel.from_pretrained(folder).float().state_dict()
    name = "vision_model.embeddings.position_embedding.weight"
    whole, places = state[name][:1], state[name][1:]
    before = math.isqrt(len(places))
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    grid = places.T.reshape(1, -1, before, before)
    drawn = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    state[name] = torch.cat([whole, drawn.flatten(2)[0].T])
    model.load_state_dict(state)


def pixels(scenes: list[Scene], size: int = 64) -> Tensor:
    """CLIP's input: (b 3 size size), mean 0.5 and deviation 0.5, so [-1, 1]."""
    stacked = np.stack([render_array(scene, size) for scene in scenes])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Padded to the longest: the text model is causal, so nothing before the end sees padding."""
    ids: Tensor = tokenizer(
        texts, padding="longest", truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def batch(
    count: int, seed: str, *, hard: bool, crowds: float = 0.0
) -> tuple[list[Scene], list[str]]:
    """Scenes with texts; with `hard`, the second half are twins of the first with other texts."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    texts: list[str] = []
    twins: list[Scene] = []
    twin_texts: list[str] = []
    while len(scenes) < (count // 2 if hard else count):
        scene = any_scene(rng, crowds, overlap=rng.choice((0.0, 0.4)))
        state = rng.getstate()
        text = training_text(scene, rng)
        if text in texts:
            continue
        if hard:
            after = rng.getstate()
            twin = near_twin(scene, rng)
            rng.setstate(state)
            twin_text = training_text(twin, rng)
            rng.setstate(after)
            rng.random()
            if twin_text == text or twin_text in twin_texts or twin_text in texts:
                continue
            twins.append(twin)
            twin_texts.append(twin_text)
        scenes.append(scene)
        texts.append(text)
    return scenes + twins, texts + twin_texts


def different_captions(
    count: int, seed: str, *, in_meaning: bool = False, crowds: float = 0.0
) -> tuple[list[Scene], list[str]]:
    """Scenes with captions that all differ; in what they say, however it is put, if asked for."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    texts: list[str] = []
    seen = set()
    while len(scenes) < count:
        scene = any_scene(rng, crowds)
        text = caption(scene, rng)
        key = said(text) if in_meaning else text
        if key not in seen:
            scenes.append(scene)
            texts.append(text)
            seen.add(key)
    return scenes, texts


def similarities(
    model: CLIPModel, tokenizer: CLIPTokenizer, scenes: list[Scene], texts: list[str]
) -> Tensor:
    size = model.config.vision_config.image_size
    logits: Tensor = model(
        input_ids=tokens(tokenizer, texts), pixel_values=pixels(scenes, size)
    ).logits_per_image
    return logits


@torch.no_grad()
def measure(
    model: CLIPModel, tokenizer: CLIPTokenizer, *, seed: int = VALIDATION_SEED, batches: int = 8
) -> dict[str, float]:
    """Percentages: one of 64 captions, and the text score of each Winoground-like kind.

    Two wordings of one thing are different captions, but not different meanings.
    """
    model.eval()
    found = {}
    for name, in_meaning in (("one_of_64", False), ("one_of_64_meanings", True)):
        right = []
        for index in range(batches):
            scenes, texts = different_captions(64, f"clip/{seed + index}", in_meaning=in_meaning)
            logits = similarities(model, tokenizer, scenes, texts)
            right.append((logits.argmax(dim=1) == torch.arange(64)).float().mean())
        found[name] = 100 * float(torch.stack(right).mean())
    for kind in WINOGROUND_KINDS:
        items = winoground_items(100, seed=seed, kinds=[kind])
        hits = 0
        for item in items:
            scores = similarities(model, tokenizer, list(item.scenes), list(item.captions))
            hits += bool(scores[0, 0] > scores[0, 1] and scores[1, 1] > scores[1, 0])
        found[kind] = float(hits)
    model.train()
    return {name: round(value, 1) for name, value in found.items()}


def learn_to_read(
    model: CLIPModel,
    readers: PatchReaders,
    steps: int,
    folder: Path,
    *,
    crowds: float = 0.0,
    half: bool = False,
) -> None:
    """Train the vision tower alone, in batches of 32."""
    modules = {"vision": model.vision_model, "readers": readers}
    run = Run(folder, modules, steps=steps, lr=1e-3, ema_decay=0.995, weight_decay=0.05)
    size = model.config.vision_config.image_size
    while run.step < steps:
        rng = random.Random(f"reading/{run.step}")
        scenes = [any_scene(rng, crowds) for _ in range(32)]
        with mixed_precision() if half else nullcontext():
            states = model.vision_model(pixel_values=pixels(scenes, size)).last_hidden_state
        reading = readers(states.float(), truths(scenes, size // PATCH))
        run.update(reading)
        if run.step % 100 == 0:
            run.log(reading=round(reading.item(), 4))
        if run.step % 500 == 0 or run.step == steps:
            run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--reading-steps", type=int, default=2000, help="before these, no texts")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--crowds", type=float, default=0.0, help="share of crowded scenes")
    parser.add_argument("--start", type=Path, help="folder of a trained one to begin from")
    parser.add_argument("--half", action="store_true", help="products in bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hard-negatives", action="store_true")
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/shapes/tokenizer"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(options.tokenizer)
    model = build(tokenizer, options.size)
    if options.start is not None:
        begin_from(model, options.start)
    readers = PatchReaders(model.config.vision_config.hidden_size)
    reading = options.output / "run" / "reading"
    learn_to_read(
        model,
        readers,
        options.reading_steps,
        reading,
        crowds=options.crowds,
        half=options.half,
    )
    run = Run(
        options.output / "run",
        {"clip": model, "readers": readers},
        steps=options.steps,
        lr=1e-3,
        ema_decay=0.995,
        weight_decay=0.05,
    )
    target = torch.arange(options.batch)
    while run.step < options.steps:
        scenes, texts = batch(
            options.batch,
            f"clip/{run.step}",
            hard=options.hard_negatives,
            crowds=options.crowds,
        )
        with mixed_precision() if options.half else nullcontext():
            found = model(
                input_ids=tokens(tokenizer, texts), pixel_values=pixels(scenes, options.size)
            )
        logits = found.logits_per_image.float()
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        states = found.vision_model_output.last_hidden_state.float()
        patches = readers(states, truths(scenes, options.size // PATCH))
        run.update(loss + patches)
        if run.step % 50 == 0:
            run.log(loss=round(loss.item(), 4), reading=round(patches.item(), 4))
        if run.step % 300 == 0 or run.step == options.steps:
            run.swap_average()
            run.log(**measure(model, tokenizer))
            model.save_pretrained(options.output)
            run.swap_average()
            run.save()
    tokenizer.save_pretrained(options.output)
    run.swap_average()
    print(json.dumps(measure(model, tokenizer)))


if __name__ == "__main__":
    main()
