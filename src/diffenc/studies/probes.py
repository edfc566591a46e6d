"""Frozen features of held-out scenes: places that are read, noise that is shared, and accuracy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from einops import einsum, reduce
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffenc.checks.arguments import whole
from diffenc.config import EncoderConfig
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError
from diffenc.inputs.images import to_pixel_values
from diffenc.models import TapInfo, describe, match_taps
from diffenc.models.base import Backbone
from diffenc.passes.encoded import image_keys, posterior_of
from diffenc.shapes.render import masks, render
from diffenc.studies.readouts import fit_readout
from diffenc.studies.trials import CLASSES, PROPERTIES, Conditioning, Property, Trial, chance_of

Place: TypeAlias = tuple[Property, Conditioning | None, str, int | None]
"""Property, text, tap and timestep; pixels and latents have neither text nor timestep."""

Progress: TypeAlias = Callable[[int, int], object]
"""Function that is called with the number of scenes, or of rows, that are done and of all."""

Where = TypeVar("Where", bound=tuple[Any, ...])
Name = TypeVar("Name", bound=str)

_BLOCKS = ("conv_in", "down_blocks.*", "mid_block", "up_blocks.*")
_STAGES = ("conv_in", "down_blocks", "mid_block", "up_blocks")
_SHARING = 8  # trials under one noise, whatever the batch size: equal results for all of them
_NOISES = 1_000_000  # seeds of noise per seed of the study


@dataclass(frozen=True, slots=True)
class ProbeStudy:
    """What was read, and where: the beginning of every study of features.

    Attributes:
        model: Name of the backbone.
        taps: Places in the U-Net, in the order in which they run.
        timesteps: Scheduler steps of the noise levels, in rising order.
    """

    model: str
    taps: tuple[str, ...]
    timesteps: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)


class Done:
    """Counter of the work that is done, which reports its progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        """Count finished work, and report the progress."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def require_distinct(what: str, values: Sequence[Any]) -> None:
    """Raise a `ConfigError` unless there are values, each once."""
    if not values or len(set(values)) != len(values):
        raise ConfigError(f"{what} must be one or more, each once, got {list(values)}")


def tap_order(
    known: Sequence[TapInfo], taps: Sequence[str] | None, default: Sequence[str]
) -> tuple[str, ...]:
    """Taps from the input of a denoiser to its output; what lies inside a block, before the block.

    Args:
        known: All taps of the model.
        taps: Module paths or globs of the taps to order; None is the blocks of a U-Net and
            `default`.
        default: Default taps of the model.

    Raises:
        TapError: A tap does not exist.
    """
    index = {tap.name: place for place, tap in enumerate(known)}
    if "conv_in" not in index:  # a transformer, whose blocks stand in order
        names = {tap.name for tap in match_taps(default if taps is None else taps, known)}
        return tuple(sorted(names, key=lambda name: index[name]))
    patterns = [*_BLOCKS, *default] if taps is None else taps

    def place(name: str) -> tuple[int, int, bool, int]:
        stage, *rest = name.split(".")
        numbered = bool(rest) and rest[0].isdecimal()
        block = int(rest[0]) if numbered else 0
        return _STAGES.index(stage), block, len(rest) == numbered, index[name]

    return tuple(sorted((tap.name for tap in match_taps(patterns, known)), key=place))


def open_encoder(
    model: "str | Backbone",
    *,
    taps: Sequence[str] | None,
    timesteps: Sequence[int],
    size: int | None,
    batch_size: int,
    device: str | torch.device,
    dtype: torch.dtype,
) -> DiffusionEncoder:
    """An encoder of all taps, in `tap_order`, and timesteps, in rising order.

    Raises:
        ConfigError: A timestep, the size or the batch size is out of range, or a timestep stands
            twice.
        BackboneError: The model is unknown, missing or broken.
        TapError: A tap does not exist in this model.
    """
    whole("batch_size", batch_size, least=1)
    require_distinct("timesteps", timesteps)
    architecture = model if isinstance(model, Backbone) else describe(model)
    config = EncoderConfig(
        taps=tap_order(architecture.taps(), taps, architecture.default_taps),
        timestep=tuple(sorted(timesteps)),
        size=size,
        batch_size=batch_size,
    )
    if isinstance(model, Backbone):
        return DiffusionEncoder(model, config)
    return DiffusionEncoder.from_pretrained(model, device=device, dtype=dtype, **config.to_dict())


def with_seed(encoder: DiffusionEncoder, seed: int) -> DiffusionEncoder:
    """The same encoder with other noise."""
    return DiffusionEncoder(encoder.backbone, replace(encoder.config, seed=seed))


def side_of(encoder: DiffusionEncoder) -> int:
    """Side of the pictures in pixels."""
    side = encoder.config.size or encoder.backbone.default_size
    assert isinstance(side, int)
    return side


def numerics(encoder: DiffusionEncoder) -> dict[str, Any]:
    """Size of the pictures and dtype, as a study notes them."""
    return {"size": side_of(encoder), "dtype": str(encoder.dtype).removeprefix("torch.")}


def per_pass(encoder: DiffusionEncoder) -> int:
    """Number of scenes per call of the U-Net, which reads each at all timesteps."""
    return max(1, (encoder.config.batch_size or 1) // len(encoder.config.timesteps))


def batches(
    encoder: DiffusionEncoder, trials: Sequence[Trial]
) -> Iterator[tuple[DiffusionEncoder, slice, list[Image.Image]]]:
    """Trials in order: the encoder with their noise, their place in the list, and their pictures.

    Eight trials at a time share their noise, and no others: under one noise for all, a readout
    would learn which noise lies where and tell positions from it, the better the more noise.

    Args:
        encoder: Encoder with the taps, the timesteps (a tuple), the seed and the batch size.
        trials: Scenes to read.
    """
    side, most = side_of(encoder), per_pass(encoder)
    for noise, first in enumerate(range(0, len(trials), _SHARING)):
        last = min(first + _SHARING, len(trials))
        for start in range(first, last, most):
            rows = slice(start, min(start + most, last))
            seeded = with_seed(encoder, encoder.config.seed * _NOISES + noise)
            yield seeded, rows, [render(trial.scene, side) for trial in trials[rows]]


def held_out_accuracies(
    vectors: Mapping[Where, Float[Tensor, "n c"]], labels: Mapping[Any, Sequence[int]]
) -> dict[Where, float]:
    """Accuracy of linear readouts that are fitted to the first two thirds, on the others.

    Args:
        vectors: One vector per scene for each place, which begins with the property to be read.
        labels: Answer of each scene, by property.
    """
    accuracies = {}
    for place, rows in vectors.items():
        answers = torch.tensor(labels[place[0]], dtype=torch.long, device="cpu")
        split = held_in(len(answers))
        readout = fit_readout(rows[:split], answers[:split], CLASSES[place[0]])
        accuracies[place] = readout.accuracy(rows[split:], answers[split:])
    return accuracies


def held_out_chances(labels: Mapping[Name, Sequence[int]]) -> dict[Name, float]:
    """Share of the most frequent answer among the scenes that are not fitted to, by property."""
    return {name: chance_of(answers[held_in(len(answers)) :]) for name, answers in labels.items()}


def held_in(scenes: int) -> int:
    """Number of scenes that are fitted to; the others are measured on."""
    return 2 * scenes // 3


def pool(
    maps: Float[Tensor, "b t c h w"], weights: Float[Tensor, "b height width"]
) -> Float[Tensor, "b t c"]:
    """Mean over cells, each weighted by the mean weight of the pixels that it stands for."""
    grid = (maps.shape[-2], maps.shape[-1])
    cells = F.adaptive_avg_pool2d(weights[:, None], grid)[:, 0]
    shares = cells / reduce(cells, "b h w -> b 1 1", "sum")
    return einsum(maps.float().cpu(), shares, "b t c h w, b h w -> b t c")


def gather(
    encoder: DiffusionEncoder,
    trials: Sequence[Trial],
    conditionings: Sequence[Conditioning],
    *,
    done: Callable[[int], object],
) -> dict[Place, Float[Tensor, "n c"]]:
    """One vector per trial at every place: features, averaged over the cells that matter.

    Args:
        encoder: Encoder that reads the features, at its taps, timesteps (a tuple), seed and batch
            size.
        trials: Scenes, with the object of each that is asked about.
        conditionings: Kinds of text to read under.
        done: Function that is called after each batch with its number of trials.
    """
    parts: dict[Place, list[Tensor]] = {}
    for seeded, rows, images in batches(encoder, trials):
        batch, side = trials[rows], images[0].height
        inside = torch.from_numpy(
            np.stack([masks(trial.scene, side)[trial.target] for trial in batch])
        ).float()
        for place, vectors in _vectors(seeded, batch, images, inside, conditionings):
            parts.setdefault(place, []).append(vectors)
        done(len(batch))
    return {place: torch.cat(vectors) for place, vectors in parts.items()}


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
    pixel_values = to_pixel_values(list(images), size=images[0].height, multiple=backbone.multiple)
    with torch.no_grad():
        latents, _ = posterior_of(backbone, pixel_values, keys=image_keys(pixel_values))
    return {"pixels": pixel_values, "latents": latents}
