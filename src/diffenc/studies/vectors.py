"""Vectors to read properties from: frozen features, averaged over the cells that matter."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from einops import einsum, reduce
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffenc.encoder import DiffusionEncoder
from diffenc.inputs.images import to_pixel_values
from diffenc.models.base import Backbone
from diffenc.passes.inputs import image_keys, posterior_of
from diffenc.shapes.render import masks, render
from diffenc.studies.results import Conditioning
from diffenc.studies.trials import PROPERTIES, Property, Trial

Place: TypeAlias = tuple[Property, Conditioning | None, str, int | None]
"""Property, text, tap and timestep; pixels and latents have neither text nor timestep."""

_SHARING = 8  # trials under one noise, whatever the batch size: equal results for all of them
_NOISES = 1_000_000  # seeds of noise per seed of the study


def pool(
    maps: Float[Tensor, "b t c h w"], weights: Float[Tensor, "b height width"]
) -> Float[Tensor, "b t c"]:
    """Mean over cells, each weighted by the mean weight of the pixels that it stands for."""
    grid = (maps.shape[-2], maps.shape[-1])
    cells = F.adaptive_avg_pool2d(weights[:, None], grid)[:, 0]
    shares = cells / reduce(cells, "b h w -> b 1 1", "sum")
    return einsum(maps.float().cpu(), shares, "b t c h w, b h w -> b t c")


def batches(trials: Sequence[Trial], most: int) -> Iterator[tuple[Sequence[Trial], int]]:
    """Trials in order, `most` at a time at most, and the number of the noise that they share."""
    for noise, first in enumerate(range(0, len(trials), _SHARING)):
        sharing = trials[first : first + _SHARING]
        for start in range(0, len(sharing), most):
            yield sharing[start : start + most], noise


def gather(
    encoder: DiffusionEncoder,
    trials: Sequence[Trial],
    conditionings: Sequence[Conditioning],
    *,
    done: Callable[[int], object],
) -> dict[Place, Float[Tensor, "n c"]]:
    """One vector per trial at every place.

    Eight trials at a time share their noise, and no others: under one noise for all, a readout
    would learn which noise lies where and tell positions from it, the better the more noise.

    Args:
        encoder: Encoder that reads the features, at its taps, timesteps (a tuple), seed and batch
            size.
        trials: Scenes, with the object of each that is asked about.
        conditionings: Kinds of text to read under.
        done: Function that is called after each batch with its number of trials.
    """
    parts: dict[Place, list[Tensor]] = {}
    config = encoder.config
    side = config.size or encoder.backbone.default_size
    assert isinstance(side, int)
    for batch, noise in batches(trials, max(1, (config.batch_size or 1) // len(config.timesteps))):
        seed = config.seed * _NOISES + noise
        seeded = DiffusionEncoder(encoder.backbone, replace(config, seed=seed))
        images = [render(trial.scene, side) for trial in batch]
        inside = torch.from_numpy(
            np.stack([masks(trial.scene, side)[trial.target] for trial in batch])
        ).float()
        for place, rows in _vectors(seeded, batch, images, inside, conditionings):
            parts.setdefault(place, []).append(rows)
        done(len(batch))
    return {place: torch.cat(rows) for place, rows in parts.items()}


def _vectors(
    encoder: DiffusionEncoder,
    batch: Sequence[Trial],
    images: Sequence[Image.Image],
    inside: Float[Tensor, "b height width"],
    conditionings: Sequence[Conditioning],
) -> Iterator[tuple[Place, Float[Tensor, "b c"]]]:
    everywhere = torch.ones_like(inside)

    def pooled(maps: Tensor, name: Property) -> Tensor:
        return pool(maps, everywhere if name == "count" else inside)

    for tap, values in _inputs(encoder.backbone, images).items():
        for name in PROPERTIES:
            yield (name, None, tap, None), pooled(values[:, None], name)[:, 0]
    for conditioning in conditionings:
        for prompts, names in _texts(batch, conditioning):
            features = encoder.extract(
                images, prompts, conditioning="uncond" if prompts is None else "cond"
            )
            for tap, maps in features.items():
                for name in names:
                    rows = pooled(maps, name)
                    for index, timestep in enumerate(encoder.config.timesteps):
                        yield (name, conditioning, tap, timestep), rows[:, index]


def _texts(
    batch: Sequence[Trial], conditioning: Conditioning
) -> Iterator[tuple[list[str] | None, Sequence[Property]]]:
    """Prompts, and the properties that are read under them."""
    if conditioning == "uncond":
        yield None, PROPERTIES
    elif conditioning == "caption":
        yield [trial.caption() for trial in batch], PROPERTIES
    else:
        for name in PROPERTIES:
            yield [trial.question(name) for trial in batch], (name,)


def _inputs(backbone: Backbone, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """Input of the U-Net without noise: the baseline that its features have to beat."""
    pixel_values = to_pixel_values(list(images), size=images[0].height, multiple=backbone.reduction)
    with torch.no_grad():
        latents, _ = posterior_of(backbone, pixel_values, keys=image_keys(pixel_values))
    return {"pixels": pixel_values, "latents": latents}
