"""Train the denoiser of a miniature diffusion model on frozen latents and a frozen text encoder.

    python tools/shapes/train_denoiser.py --steps 6000
    python tools/shapes/train_denoiser.py --size 96 --crowds 0.65 --colors --model runs/shapes-many
    python tools/shapes/train_denoiser.py --kind transformer --teacher runs/shapes --model runs/dit

Needs the VAE, the text encoder and the tokenizer in `--model`. Latents, token ids and masks of the
training scenes are computed once and kept beside the run. Writes averaged weights to `--model`.

A quarter of each batch are negatives: rows again, with the same noise, under a near twin's caption.
As in HardNeg-DiffusionITM (Krojer et al., NeurIPS 2023) the true caption must explain the noise
better; by denoising alone a small U-Net hardly learns to count. With `--marked` the two are held
against each other over the cells alone of which they say different things, and with `--beside` what
a text changes elsewhere is held down.

With `--teacher` the target is what the trained U-Net of another folder predicts, under true and
false captions, in place of the noise: the same mean without its scatter, so fewer steps do. What
a false caption changes of the prediction is held against what it changes of the teacher's.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import worlds
from denoisers import KINDS, SIGNAL, build_scheduler, own_tokens, taught_by
from diffusers import AutoencoderKL
from grounding import outside
from spoken_cells import beside, cells, concerned, missed, spoken_about
from torch import Tensor, nn
from torch.nn import functional as F
from training import VALIDATION_SEED, Run, mixed_precision
from transformers import CLIPTextModel, CLIPTokenizer

from diffenc.denoiser.attention import CrossAttnTaps
from diffenc.shapes.crowds import COUNTS
from diffenc.shapes.pairs import WINOGROUND_KINDS, WinogroundKind, winoground_items
from diffenc.shapes.pictures import NOUNS
from diffenc.shapes.scenes import SHAPES

Denoise = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Predicts noise of noisy latents, timesteps, text states and which tokens are a text's own."""

TEXTS_PER_SCENE = 4
CHUNK = 250
TIMESTEPS = (189, 389, 589, 789, 989)
FOCUS = (150, 800)
"""Two of three timesteps are drawn from here, where text says most that the image does not."""
LEVELS = 20
"""Parts of the schedule; each counts by its error relative to the part's recent mean."""
LOW = 150
"""Below it even small objects are seen well; rows of `--low` have their timesteps from there."""
GROUNDING_WEIGHT = 0.5
NEGATIVES = 0.25
"""Share of the rows that are negatives."""
BARE = 0.2
"""Share of the rows that are there again without a text, where that is compared (`--beside`)."""
MARGIN = 0.02
"""By how much a wrong caption's error should be larger, as a share of the level's usual error."""


class Text:
    """The frozen tokenizer and text encoder."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
        self.encoder.requires_grad_(False)
        self.learnt: Tensor | None = None
        self.kept = torch.empty(0)

    def ids(self, texts: list[str]) -> Tensor:
        ids: Tensor = self.tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return ids

    def states(self, ids: Tensor) -> Tensor:
        states: Tensor = self.encoder(ids).last_hidden_state
        return states

    def learn(self, words: Sequence[str]) -> nn.Module:
        """The module that holds the embeddings, to be trained; see `restore`."""
        table: nn.Embedding = self.encoder.get_input_embeddings()
        self.learnt = torch.zeros(len(table.weight), 1, dtype=torch.bool)
        self.learnt[self.numbers(words)] = True
        self.kept = table.weight.detach().clone()
        return table.requires_grad_(True)

    def restore(self) -> None:
        """Give all words but those that are learnt the embeddings that they had."""
        if self.learnt is not None:
            weight = self.encoder.get_input_embeddings().weight
            weight.data.copy_(torch.where(self.learnt, weight.data, self.kept))

    def numbers(self, words: Sequence[str]) -> Tensor:
        """Token ids of words that are one token each."""
        pieces = [f"{word}</w>" for word in words]
        known = self.tokenizer.get_vocab()
        return torch.tensor([known[piece] for piece in pieces if piece in known])


@torch.no_grad()
def encode(vae: AutoencoderKL, values: Tensor) -> Tensor:
    latents: Tensor = vae.encode(values).latent_dist.mode() * vae.config.scaling_factor
    return latents


def cached_data(
    file: Path,
    count: int,
    vae: AutoencoderKL,
    text: Text,
    *,
    size: int,
    crowds: float,
    pictures: float,
    colors: bool,
) -> dict[str, Tensor]:
    """What the training reads of its scenes, in integers and half precision.

    latents (n 4 side side), shares (n objects side side) of each cell that an object covers in
    255ths, and for several texts a scene their token ids and the objects they speak of (n texts
    32), and the ids of a wrong caption (0 throughout where there is none).
    """
    if file.exists():
        kept: dict[str, Tensor] = torch.load(file, weights_only=True)
        return kept
    rng = random.Random("unet")
    found: dict[str, list[Tensor]] = {"latents": [], "shares": [], "ids": [], "bits": []}
    found["wrong"] = []
    other = random.Random("unet/twins")
    most = COUNTS[1] if crowds or pictures else 3
    for start in range(0, count, CHUNK):
        drawn = [worlds.drawn(rng, crowds=crowds, pictures=pictures) for _ in range(CHUNK)]
        scenes = [scene for scene, _ in drawn]
        found["latents"].append(encode(vae, worlds.pixels(scenes, size)).half())
        side = found["latents"][0].shape[-1]
        shares = [worlds.covered(scene, size, side, most) for scene in scenes]
        found["shares"].append(torch.stack(shares))
        texts = [
            [worlds.text(scene, rng, saying) for _ in range(TEXTS_PER_SCENE)]
            for scene, saying in drawn
        ]
        ids = text.ids([line for lines in texts for line in lines])
        found["ids"].append(ids.view(CHUNK, TEXTS_PER_SCENE, -1).short())
        wrong = [
            worlds.false_texts(scene, lines, other)
            for scene, lines in zip(scenes, texts, strict=True)
        ]
        twins = text.ids([line or "" for lines in wrong for line in lines])
        twins *= torch.tensor([[line is not None] for lines in wrong for line in lines])
        found["wrong"].append(twins.view(CHUNK, TEXTS_PER_SCENE, -1).short())
        bits = [
            [worlds.named(text.tokenizer, line, scene, colors=colors) for line in lines]
            for scene, lines in zip(scenes, texts, strict=True)
        ]
        found["bits"].append(torch.tensor(bits, dtype=torch.int16))
        if start % (20 * CHUNK) == 0:
            print(f"encoded {start}", flush=True)
    data = {name: torch.cat(parts) for name, parts in found.items()}
    torch.save(data, file)
    return data


@torch.no_grad()
def winoground_text(
    denoise: Denoise, vae: AutoencoderKL, text: Text, kind: WinogroundKind, items: int
) -> dict[str, float]:
    """Text, image and group score in percent, by negative squared error with shared noise."""
    pairs = winoground_items(items, seed=VALIDATION_SEED, kinds=[kind])
    size = vae.config.sample_size
    latents = encode(vae, worlds.pixels([scene for pair in pairs for scene in pair.scenes], size))
    ids = text.ids([caption for pair in pairs for caption in pair.captions])
    states, own = text.states(ids), own_tokens(ids)
    rows = torch.arange(2 * items)
    scores = torch.zeros(2, 2, items)  # image, text
    for timestep in TIMESTEPS:
        generator = torch.Generator().manual_seed(timestep)
        noise = torch.randn(latents.shape[1:], generator=generator).expand_as(latents)
        signal = SIGNAL[timestep]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        for other in (False, True):
            order = rows.view(-1, 2).flip(1).flatten() if other else rows
            found = []
            for part in rows.split(64):
                level = torch.full((len(part),), timestep)
                predicted = denoise(noisy[part], level, states[order[part]], own[order[part]])
                found.append(-row_errors(predicted, noise[part]))
            error = torch.cat(found).view(-1, 2)
            for image in (0, 1):
                scores[image, image ^ int(other)] += error[:, image]
    by_text = (scores[0, 0] > scores[0, 1]) & (scores[1, 1] > scores[1, 0])
    by_image = (scores[0, 0] > scores[1, 0]) & (scores[1, 1] > scores[0, 1])
    parts = {"text": by_text, "image": by_image, "group": by_text & by_image}
    return {name: round(100 * hits.float().mean().item(), 1) for name, hits in parts.items()}


def row_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row."""
    errors: Tensor = F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
    return errors


def unlike_changes(predicted: Tensor, target: Tensor, true: Tensor) -> Tensor:
    """How far a false caption changes predictions otherwise than targets, as a share of the latter.

    Args:
        predicted: Predictions (b c h w), of which the last rows are under false captions.
        target: What they should be.
        true: For each of the last rows that of the true caption.
    """
    start = len(predicted) - len(true)
    ours, theirs = (rows[start:] - rows[true] for rows in (predicted, target))
    size = theirs.square().mean(dim=(1, 2, 3))
    return (row_errors(ours, theirs) / (size + 0.1 * size.mean())).mean()


def draw_timesteps(batch: int, generator: torch.Generator, *, low: float = 0.0) -> Tensor:
    """A third from the whole schedule, a share from below `LOW`, the rest from `FOCUS`.

    Each part is evenly spread, for less variance.
    """
    whole, below = batch // 3, round(low * batch)
    parts = [(0, 1000, whole), (0, LOW, below), (*FOCUS, batch - whole - below)]
    parts = [part for part in parts if part[2]]
    drawn = [
        low + (torch.arange(count) + torch.rand(count, generator=generator)) / count * (high - low)
        for low, high, count in parts
    ]
    return torch.cat(drawn).long()


def recent(usual: Tensor, errors: Tensor, levels: Tensor) -> Tensor:
    """Moving mean of the errors per level of noise; NaN where there was none yet."""
    found = torch.zeros(LEVELS).index_add_(0, levels, errors)
    mean = found / torch.bincount(levels, minlength=LEVELS)
    moved = torch.where(usual.isnan(), mean, torch.lerp(usual, mean, 0.05))
    return torch.where(mean.isnan(), usual, moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", type=Path, default=Path("runs/shapes-unet"))
    parser.add_argument("--model", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--crowds", type=float, default=0.0, help="share of crowded scenes")
    parser.add_argument("--pictures", type=float, default=0.0, help="share of little pictures")
    parser.add_argument("--colors", action="store_true", help="ground colour words and 'object'")
    parser.add_argument("--grounding", type=float, default=GROUNDING_WEIGHT)
    parser.add_argument(
        "--clear", type=float, default=1.0, help="signal to noise at which words count fully"
    )
    parser.add_argument("--low", type=float, default=0.0, help="share of low timesteps")
    parser.add_argument("--kind", choices=KINDS, default="unet")
    parser.add_argument("--teacher", type=Path, help="a model whose U-Net says what is predicted")
    parser.add_argument("--half", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--warm-start", type=Path, help="a denoiser's folder to go on from")
    parser.add_argument("--learn-words", action="store_true", help="train the pictures' nouns too")
    parser.add_argument(
        "--marked", type=float, default=0.0, help="by how much false captions are to miss; 0: not"
    )
    parser.add_argument(
        "--beside",
        type=float,
        default=0.0,
        help="weight of what a text changes beside what it names",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(options.model / "vae").eval()
    text = Text(options.model)
    options.run.mkdir(parents=True, exist_ok=True)
    data = cached_data(
        options.run / "data.pt",
        options.scenes,
        vae,
        text,
        size=options.size,
        crowds=options.crowds,
        pictures=options.pictures,
        colors=options.colors,
    )
    side = data["latents"].shape[-1]
    kind = KINDS[options.kind]
    model = kind.build(side)
    if options.warm_start is not None:
        model = kind.load(options.warm_start)
        model.register_to_config(sample_size=side)
        model.train()
    denoise: Denoise = partial(kind.noise, model)
    teacher = None if options.teacher is None else taught_by(options.teacher)
    modules: dict[str, nn.Module] = {kind.part: model}
    if options.learn_words:
        modules["words"] = text.learn(NOUNS)
    nouns = text.numbers((*SHAPES, "object", *NOUNS))
    run = Run(options.run, modules, steps=options.steps, lr=options.lr, ema_decay=0.9985)
    snr = SIGNAL / (1 - SIGNAL)
    usual = torch.full((LEVELS,), math.nan)
    empty = text.ids([""]).short()
    negatives = round(NEGATIVES * options.batch)
    bare = round(BARE * options.batch) if options.beside else 0
    count = options.batch - negatives - bare
    means: list[float] = []
    while run.step < options.steps:
        generator = torch.Generator().manual_seed(run.step)
        rows = torch.randint(len(data["latents"]), (count,), generator=generator)
        which = torch.randint(TEXTS_PER_SCENE, (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < 0.1
        ids = torch.where(dropped[:, None], empty, data["ids"][rows, which])
        wrong = data["wrong"][rows, which]
        order = torch.randperm(count, generator=generator)
        again = order[(wrong.any(dim=1) & ~dropped)[order]][:negatives]
        bits = torch.where(dropped[:, None], 0, data["bits"][rows, which])
        untexted = order[~dropped[order]][-bare:] if bare else order[:0]
        own_bits, true_ids, false_ids = bits, ids.long(), wrong[again].long()
        nothing = empty.expand(len(untexted), -1)
        ids = torch.cat([ids, wrong[again], nothing]).long()
        more = len(again) + len(untexted)
        bits = torch.cat([bits, bits.new_zeros(more, bits.shape[1])])
        noise = torch.randn((count, *data["latents"].shape[1:]), generator=generator)
        timesteps = draw_timesteps(count, generator, low=options.low)
        every = torch.cat([torch.arange(count), again, untexted])
        rows, noise, timesteps = rows[every], noise[every], timesteps[every]
        latents = data["latents"][rows].float()
        signal = SIGNAL[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        states, own = text.states(ids), own_tokens(ids)
        precision = mixed_precision if options.half else nullcontext
        with precision(), CrossAttnTaps(model, kind.grounded, tokens=range(ids.shape[1])) as taps:
            predicted = denoise(noisy, timesteps, states, own).float()
        with precision():
            target = noise if teacher is None else teacher(noisy, timesteps, states, own).float()
        errors = row_errors(predicted, target)
        levels = timesteps * LEVELS // 1000
        usual = recent(usual, errors[:count].detach(), levels[:count])
        unit = usual[levels]
        errors = errors / unit
        false = slice(count, count + len(again))
        plainly = torch.cat([errors[:count], errors[false.stop :]])
        loss = plainly.mean() if teacher is None else errors.mean()
        shares = data["shares"][rows].float() / 255
        weights = (snr[timesteps] / options.clear).clamp(max=1)
        astray = outside(taps.maps(), shares, bits, weights)
        gap = errors[false] - errors[again]
        scaled, right = (each / unit.sqrt().view(-1, 1, 1, 1) for each in (predicted, noise))
        if options.marked:
            disputed = concerned(true_ids[again], false_ids, own_bits[again], nouns)
            inside = cells(disputed, shares[again])
            pairs = missed(scaled[again], scaled[false], right[again], inside, options.marked)
            pairs = pairs + options.beside * beside(scaled[false], scaled[again], inside)
        elif teacher is None:
            pairs = MARGIN * F.softplus(-gap / MARGIN).sum() / count
        else:
            pairs = unlike_changes(predicted, target, again)
        if bare:
            about = spoken_about(true_ids[untexted], own_bits[untexted], nouns)
            inside = cells(about, shares[untexted])
            pairs = pairs + options.beside * beside(scaled[untexted], scaled[false.stop :], inside)
        run.update(loss + options.grounding * astray + pairs)
        text.restore()
        plain = row_errors(predicted.detach(), noise)
        told_apart = 100 * (plain[false] > plain[again]).float().mean()
        latest = [value.item() for value in (loss, astray, told_apart, pairs)]
        means = [
            0.98 * mean + 0.02 * value for mean, value in zip(means or latest, latest, strict=True)
        ]
        if run.step % 50 == 0:
            run.log(
                loss=round(means[0], 5),
                mse=round(usual.nanmean().item(), 5),
                astray=round(means[1], 4),
                told_apart=round(means[2], 1),
                pairs=round(means[3], 4),
            )
        if run.step % 500 == 0 or run.step == options.steps:
            run.swap_average()
            text.restore()
            model.eval()
            found = {k: winoground_text(denoise, vae, text, k, 40) for k in WINOGROUND_KINDS}
            run.log(**found)
            model.save_pretrained(options.model / kind.part)
            if options.learn_words:
                text.encoder.save_pretrained(options.model / "text_encoder")
            model.train()
            run.swap_average()
            run.save()
    build_scheduler(kind.predicts).save_pretrained(options.model / "scheduler")
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main()
