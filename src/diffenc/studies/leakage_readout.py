"""How much of a prompt a linear layer finds in the features, where, and in which part of them.

The prompt has nothing to do with the picture: its colour and its shape are drawn anew. Whatever is
read of it came through the text, so that features without a text give chance.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any, Literal, get_args

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from diffenc.config import EncoderConfig
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError
from diffenc.models import load_backbone
from diffenc.models.base import Backbone
from diffenc.shapes.captions import noun_phrase
from diffenc.shapes.render import render
from diffenc.shapes.scenes import COLORS, SHAPES, Color, Shape
from diffenc.studies.features import tap_order
from diffenc.studies.readouts import fit_readout
from diffenc.studies.results import Spread
from diffenc.studies.settings import (
    Done,
    Progress,
    chance_of,
    require_distinct,
    require_least,
)
from diffenc.studies.trials import Trial, sample_trials
from diffenc.studies.vectors import batches

Word = Literal["color", "shape"]
WORDS: tuple[Word, ...] = get_args(Word)

Part = Literal["uncond", "cond", "cfg", "difference"]
"""f_u, f_c, f_u + s (f_c - f_u), and f_c - f_u."""

SCALES = (1.5, 4.5, 7.0)
"""Guidance scales of the paper's table 5."""

_Place = tuple[Word, Part, float | None, str, int]
_NOISES = 1_000_000  # seeds of noise per seed of the study


@dataclass(frozen=True, slots=True)
class PromptReading:
    """Accuracy of reading a word of the prompt from one place.

    Attributes:
        word: Word that is read: "color" or "shape".
        part: Part of the features that is read: "uncond", "cond", "cfg" or "difference".
        guidance_scale: Guidance scale s of the part "cfg"; None for the other parts.
        tap: Place in the U-Net, as a module path.
        timestep: Scheduler step of the noise level.
        accuracy: Accuracy on pictures and prompts that the readout was not fitted to, 0 to 1.
    """

    word: Word
    part: Part
    guidance_scale: float | None
    tap: str
    timestep: int
    accuracy: Spread


@dataclass(frozen=True, slots=True)
class Loudness:
    """Size of the text-dependent part of the features.

    Attributes:
        tap: Place in the U-Net, as a module path.
        timestep: Scheduler step of the noise level.
        ratio: Mean of |f_c - f_u| over cells and pictures, divided by that of |f_u|.
    """

    tap: str
    timestep: int
    ratio: Spread


@dataclass(frozen=True, slots=True)
class LeakageReadout:
    """Results of the study.

    Attributes:
        model: Name of the backbone.
        taps: Places in the U-Net, in the order in which they run.
        timesteps: Scheduler steps of the noise levels, in rising order.
        guidance_scales: Guidance scales of "cfg", in rising order.
        readings: Accuracy of each word, part, scale, tap and timestep.
        loudness: Size of the text-dependent part at each tap and timestep.
        chance: Share of the most frequent value of each word among the test prompts, 0 to 1, mean
            over seeds.
        settings: Settings of the run: numbers of scenes and seeds, picture size and dtype.
    """

    model: str
    taps: tuple[str, ...]
    timesteps: tuple[int, ...]
    guidance_scales: tuple[float, ...]
    readings: tuple[PromptReading, ...]
    loudness: tuple[Loudness, ...]
    chance: dict[Word, float]
    settings: dict[str, Any]

    def find(
        self, word: Word, part: Part, tap: str, timestep: int, guidance_scale: float | None = None
    ) -> Spread:
        """Accuracy at one place.

        Raises:
            ConfigError: It was not read there.
        """
        wanted = (word, part, guidance_scale, tap, timestep)
        for each in self.readings:
            if (each.word, each.part, each.guidance_scale, each.tap, each.timestep) == wanted:
                return each.accuracy
        raise ConfigError(f"nothing was read at {wanted}; taps are {self.taps}")

    def rows(self, word: Word) -> list[tuple[str, ...]]:
        """Cells of a table: tap and timestep, |f_c - f_u| / |f_u|, then percent per part."""
        made = []
        for loud in self.loudness:
            place = (loud.tap, loud.timestep)
            found = [self.find(word, "uncond", *place), self.find(word, "cond", *place)]
            found += [self.find(word, "cfg", *place, scale) for scale in self.guidance_scales]
            found.append(self.find(word, "difference", *place))
            cells = [_percent(each) for each in found]
            made.append((loud.tap, str(loud.timestep), f"{loud.ratio.mean:.3f}", *cells))
        return made

    def columns(self) -> tuple[str, ...]:
        """Heads of `rows`."""
        scales = [f"cfg {scale:g}" for scale in self.guidance_scales]
        return ("tap", "timestep", "change", "uncond", "cond", *scales, "cond - uncond")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)


def study_leakage_readout(
    model: "str | Backbone" = "shapes",
    *,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[int] = (50, 261),
    guidance_scales: Sequence[float] = SCALES,
    scenes: int = 240,
    seeds: int = 3,
    size: int | None = None,
    batch_size: int = 48,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> LeakageReadout:
    """Read the colour and the shape that a mismatched prompt names from frozen features.

    Held-out scenes of the miniature world are encoded under "a red circle" and the like, drawn
    independently of the scene: one in six prompts names a colour that is there by chance, since a
    prompt that avoided those would let the picture tell of it. Features are averaged over all
    cells, and read by a linear layer in closed form, fitted to two thirds of the scenes and
    measured on the rest. One pass of the U-Net per scene and timestep gives f_u and f_c at every
    tap; guidance is linear and so is the average, so "cfg" at any scale follows from their means.

    Reading from "uncond" has to be at chance. Where "cond" is far above it and "difference" as far
    or further, the prompt sits in f_c - f_u, and guidance, which multiplies that part by s while
    the picture's stays, brings "cfg" from "cond" towards "difference".

    Args:
        model: Alias, Hub id or folder of a diffusion model, or a loaded `Backbone`.
        taps: Module paths or globs of the places to read; None takes the blocks and the backbone's
            default taps.
        timesteps: Scheduler steps of the noise levels, each 0 to 999.
        guidance_scales: Guidance scales s of the part "cfg", f_u + s (f_c - f_u).
        scenes: Number of scenes per seed, 30 or more.
        seeds: Number of repetitions, each with other scenes, prompts and noise.
        size: Side of the pictures in pixels; None is the backbone's own.
        batch_size: Number of rows (scenes x timesteps) per call of the U-Net; one scene's rows are
            never split.
        device: Device that the model runs on; unused for a `Backbone`.
        dtype: Floating point type of the U-Net; unused for a `Backbone`.
        progress: Function that is called after each batch with the number of scenes that are done
            and the number of all scenes; None reports nothing.

    Raises:
        ConfigError: A number is too small, or a timestep or scale stands twice or is not finite.
        BackboneError: The model is unknown, missing or broken.
        TapError: A tap does not exist in this model.

    Example:
        >>> study = study_leakage_readout(scenes=60, seeds=1, timesteps=[50])
        >>> study.find("color", "difference", "up_blocks.1", 50).mean > study.chance["color"]
        True

    Source:
        Leakage of prompts: arXiv:2507.07106, abstract. Linear probes: Alain and Bengio 2016,
        arXiv:1610.01644.
    """
    _check(timesteps, guidance_scales, scenes, seeds, batch_size)
    scales = tuple(sorted(float(scale) for scale in guidance_scales))
    backbone = (
        model if isinstance(model, Backbone) else load_backbone(model, device=device, dtype=dtype)
    )
    chosen = tap_order(backbone.taps(), taps, backbone.default_taps)
    steps = tuple(sorted(timesteps))
    config = EncoderConfig(taps=chosen, timestep=steps, size=size, batch_size=batch_size)
    found: dict[_Place, list[float]] = {}
    loud: dict[tuple[str, int], list[float]] = {}
    chances: list[dict[Word, float]] = []
    done = Done(progress, seeds * scenes)
    for seed in range(seeds):
        trials = sample_trials(scenes, seed=seed)
        named = sample_prompts(scenes, seed=seed)
        vectors, ratios = _gather(backbone, replace(config, seed=seed), trials, named, done.add)
        for place, ratio in ratios.items():
            loud.setdefault(place, []).append(ratio)
        split = 2 * scenes // 3
        for word in WORDS:
            labels = torch.tensor(
                [_label(each, word) for each in named], dtype=torch.long, device="cpu"
            )
            chances.append({word: chance_of(labels[split:].tolist())})
            classes = len(COLORS if word == "color" else SHAPES)
            for (tap, step), (uncond, cond) in vectors.items():
                for part, scale, rows in _parts(uncond, cond, scales):
                    readout = fit_readout(rows[:split], labels[:split], classes)
                    accuracy = readout.accuracy(rows[split:], labels[split:])
                    found.setdefault((word, part, scale, tap, step), []).append(accuracy)
    return LeakageReadout(
        model=backbone.name,
        taps=chosen,
        timesteps=steps,
        guidance_scales=scales,
        readings=tuple(PromptReading(*place, Spread(tuple(each))) for place, each in found.items()),
        loudness=tuple(Loudness(*place, Spread(tuple(each))) for place, each in loud.items()),
        chance={w: mean(c[w] for c in chances if w in c) for w in WORDS},
        settings={
            "scenes": scenes,
            "seeds": seeds,
            "size": size or backbone.default_size,
            "dtype": str(next(backbone.denoiser.parameters()).dtype).removeprefix("torch."),
        },
    )


def sample_prompts(count: int, *, seed: int) -> list[tuple[Color, Shape]]:
    """Colour and shape that each prompt names, independent of all scenes and of each other."""
    rng = random.Random(f"leakage prompts/{seed}")
    return [(rng.choice(COLORS), rng.choice(SHAPES)) for _ in range(count)]


def _gather(
    backbone: Backbone,
    config: EncoderConfig,
    trials: Sequence[Trial],
    named: Sequence[tuple[Color, Shape]],
    done: Callable[[int], object],
) -> tuple[dict[tuple[str, int], tuple[Tensor, Tensor]], dict[tuple[str, int], float]]:
    """Per tap and timestep the means of f_u and f_c over cells (n c), and how loud f_c - f_u is."""
    side = config.size or backbone.default_size
    assert isinstance(side, int)
    means: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}
    sizes: dict[tuple[str, int], list[tuple[float, float]]] = {}
    per_pass = max(1, (config.batch_size or 1) // len(config.timesteps))
    start = 0
    for batch, noise in batches(trials, per_pass):
        seeded = DiffusionEncoder(backbone, replace(config, seed=config.seed * _NOISES + noise))
        prompts = [
            noun_phrase(shape=shape, color=color)
            for color, shape in named[start : start + len(batch)]
        ]
        images = [render(trial.scene, side) for trial in batch]
        features = seeded.extract(images, prompts, conditioning="cfg")
        uncond, cond = features.select("uncond"), features.select("cond")
        for tap in features:
            for index, step in enumerate(config.timesteps):
                pair = uncond[tap][:, index].float().cpu(), cond[tap][:, index].float().cpu()
                rows = means.setdefault((tap, step), ([], []))
                for kept, maps in zip(rows, pair, strict=True):
                    kept.append(reduce(maps, "b c h w -> b c", "mean"))
                change = float((pair[1] - pair[0]).norm(dim=1).mean())
                size = float(pair[0].norm(dim=1).mean())
                sizes.setdefault((tap, step), []).append((change * len(batch), size * len(batch)))
        start += len(batch)
        seeded.clear_cache()
        done(len(batch))
    joined = {place: (torch.cat(rows[0]), torch.cat(rows[1])) for place, rows in means.items()}
    ratios = {
        place: sum(change for change, _ in each) / max(sum(size for _, size in each), 1e-12)
        for place, each in sizes.items()
    }
    return joined, ratios


def _parts(
    uncond: Float[Tensor, "n c"], cond: Float[Tensor, "n c"], scales: Sequence[float]
) -> list[tuple[Part, float | None, Float[Tensor, "n c"]]]:
    parts: list[tuple[Part, float | None, Tensor]] = [
        ("uncond", None, uncond),
        ("cond", None, cond),
        ("difference", None, cond - uncond),
    ]
    return [*parts, *(("cfg", scale, torch.lerp(uncond, cond, scale)) for scale in scales)]


def _label(named: tuple[Color, Shape], word: Word) -> int:
    color, shape = named
    return COLORS.index(color) if word == "color" else SHAPES.index(shape)


def _percent(found: Spread) -> str:
    deviation = "" if found.deviation is None else f" ± {100 * found.deviation:.1f}"
    return f"{100 * found.mean:.1f}{deviation}"


def _check(
    timesteps: Sequence[int],
    scales: Sequence[float],
    scenes: int,
    seeds: int,
    batch_size: int,
) -> None:
    require_least({"scenes": (scenes, 30), "seeds": (seeds, 1), "batch_size": (batch_size, 1)})
    require_distinct("timesteps", timesteps)
    finite = all(abs(scale) < float("inf") for scale in scales)
    if len(set(scales)) != len(scales) or not finite:
        raise ConfigError(f"guidance_scales must be finite, each once, got {list(scales)}")
