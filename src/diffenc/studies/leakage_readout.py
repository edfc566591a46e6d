"""How much of a prompt a linear layer finds in the features, where, and in which part of them.

The prompt has nothing to do with the picture: its colour and its shape are drawn anew. Whatever is
read of it came through the text, so that features without a text give chance.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from diffenc.checks.arguments import whole
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError
from diffenc.models.base import Backbone
from diffenc.shapes.captions import noun_phrase
from diffenc.shapes.scenes import COLORS, SHAPES, Color, Shape
from diffenc.studies.probes import (
    Done,
    ProbeStudy,
    Progress,
    batches,
    held_out_accuracies,
    held_out_chances,
    numerics,
    open_encoder,
    with_seed,
)
from diffenc.studies.spreads import Spread, over_seeds
from diffenc.studies.trials import (
    Trial,
    sample_trials,
)

Word = Literal["color", "shape"]
WORDS: tuple[Word, ...] = get_args(Word)

Part = Literal["uncond", "cond", "cfg", "difference"]
"""f_u, f_c, f_u + s (f_c - f_u), and f_c - f_u."""

SCALES = (1.5, 4.5, 7.0)
"""Guidance scales of the paper's table 5."""

_Place = tuple[Word, Part, float | None, str, int]


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
class LeakageReadout(ProbeStudy):
    """Results of the study.

    Attributes:
        guidance_scales: Guidance scales of "cfg", in rising order.
        readings: Accuracy of each word, part, scale, tap and timestep.
        loudness: Size of the text-dependent part at each tap and timestep.
        chance: Share of the most frequent value of each word among the test prompts, 0 to 1, mean
            over seeds.
        settings: Settings of the run: numbers of scenes and seeds, picture size and dtype.
    """

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
        place = (word, part, guidance_scale, tap, timestep)
        for each in self.readings:
            if (each.word, each.part, each.guidance_scale, each.tap, each.timestep) == place:
                return each.accuracy
        raise ConfigError(f"nothing was read at {place}; taps are {self.taps}")

    def rows(self, word: Word) -> list[tuple[str, ...]]:
        """Cells of a table: tap and timestep, |f_c - f_u| / |f_u|, then percent per part."""
        parts: list[tuple[Part, float | None]] = [("uncond", None), ("cond", None)]
        parts += [("cfg", scale) for scale in self.guidance_scales]
        parts.append(("difference", None))
        rows = []
        for loud in self.loudness:
            spreads = [self.find(word, part, loud.tap, loud.timestep, s) for part, s in parts]
            cells = [f"{spread.percent:.1f}" for spread in spreads]
            rows.append((loud.tap, str(loud.timestep), f"{loud.ratio.mean:.3f}", *cells))
        return rows

    def columns(self) -> tuple[str, ...]:
        """Heads of `rows`."""
        scales = [f"cfg {scale:g}" for scale in self.guidance_scales]
        return ("tap", "timestep", "change", "uncond", "cond", *scales, "cond - uncond")


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

    Examples:
        >>> study = study_leakage_readout(scenes=60, seeds=1, timesteps=[50])
        >>> study.find("color", "difference", "up_blocks.1", 50).mean > study.chance["color"]
        True

    Source:
        Leakage of prompts: arXiv:2507.07106, abstract. Linear probes: Alain and Bengio 2016,
        arXiv:1610.01644.
    """
    whole("scenes", scenes, least=30)
    whole("seeds", seeds, least=1)
    scales = tuple(sorted(float(scale) for scale in guidance_scales))
    if len(set(scales)) != len(scales) or not all(map(math.isfinite, scales)):
        raise ConfigError(f"guidance_scales must be finite, each once, got {list(scales)}")
    encoder = open_encoder(
        model,
        taps=taps,
        timesteps=timesteps,
        size=size,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    done = Done(progress, seeds * scenes)
    accuracies: list[dict[_Place, float]] = []
    loudness: list[dict[tuple[str, int], float]] = []
    chances: list[dict[Word, float]] = []
    for seed in range(seeds):
        seeded = with_seed(encoder, seed)
        prompts = sample_prompts(scenes, seed=seed)
        halves, ratios = _gather(seeded, sample_trials(scenes, seed=seed), prompts, done.add)
        vectors = {
            (word, part, scale, *place): rows
            for word in WORDS
            for place, (uncond, cond) in halves.items()
            for part, scale, rows in _parts(uncond, cond, scales)
        }
        labels: dict[Word, list[int]] = {
            "color": [COLORS.index(color) for color, _ in prompts],
            "shape": [SHAPES.index(shape) for _, shape in prompts],
        }
        accuracies.append(held_out_accuracies(vectors, labels))
        loudness.append(ratios)
        chances.append(held_out_chances(labels))
        seeded.clear_cache()
    readings, loud = over_seeds(accuracies), over_seeds(loudness)
    return LeakageReadout(
        model=encoder.backbone.name,
        taps=encoder.config.taps or (),
        timesteps=encoder.config.timesteps,
        guidance_scales=scales,
        readings=tuple(PromptReading(*place, each) for place, each in readings.items()),
        loudness=tuple(Loudness(*place, each) for place, each in loud.items()),
        chance={word: each.mean for word, each in over_seeds(chances).items()},
        settings={"scenes": scenes, "seeds": seeds, **numerics(encoder)},
    )


def sample_prompts(count: int, *, seed: int) -> list[tuple[Color, Shape]]:
    """Colour and shape that each prompt names, independent of all scenes and of each other."""
    rng = random.Random(f"leakage prompts/{seed}")
    return [(rng.choice(COLORS), rng.choice(SHAPES)) for _ in range(count)]


def _gather(
    encoder: DiffusionEncoder,
    trials: Sequence[Trial],
    named: Sequence[tuple[Color, Shape]],
    done: Callable[[int], object],
) -> tuple[dict[tuple[str, int], tuple[Tensor, Tensor]], dict[tuple[str, int], float]]:
    """Per tap and timestep the means of f_u and f_c over cells (n c), and how loud f_c - f_u is."""
    means: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}
    sizes: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for seeded, rows, images in batches(encoder, trials):
        prompts = [noun_phrase(shape=shape, color=color) for color, shape in named[rows]]
        features = seeded.extract(images, prompts, conditioning="cfg")
        uncond, cond = features.select("uncond"), features.select("cond")
        for tap in features:
            for index, step in enumerate(encoder.config.timesteps):
                pair = uncond[tap][:, index].float().cpu(), cond[tap][:, index].float().cpu()
                halves = means.setdefault((tap, step), ([], []))
                for half, maps in zip(halves, pair, strict=True):
                    half.append(reduce(maps, "b c h w -> b c", "mean"))
                change = float((pair[1] - pair[0]).norm(dim=1).mean()) * len(images)
                size = float(pair[0].norm(dim=1).mean()) * len(images)
                sizes.setdefault((tap, step), []).append((change, size))
        done(len(images))
    vectors = {
        place: (torch.cat(halves[0]), torch.cat(halves[1])) for place, halves in means.items()
    }
    ratios = {
        place: sum(change for change, _ in each) / max(sum(size for _, size in each), 1e-12)
        for place, each in sizes.items()
    }
    return vectors, ratios


def _parts(
    uncond: Float[Tensor, "n c"], cond: Float[Tensor, "n c"], scales: Sequence[float]
) -> list[tuple[Part, float | None, Float[Tensor, "n c"]]]:
    parts: list[tuple[Part, float | None, Tensor]] = [
        ("uncond", None, uncond),
        ("cond", None, cond),
        ("difference", None, cond - uncond),
    ]
    return [*parts, *(("cfg", scale, torch.lerp(uncond, cond, scale)) for scale in scales)]
