"""Register cells: how many a tap has, where they lie, and how much they make of its variance."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffenc.checks.arguments import whole
from diffenc.denoiser.registers import REGISTER_RATIO, register_cells
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, TapError
from diffenc.models import TapInfo, describe, match_taps
from diffenc.models.base import Backbone
from diffenc.shapes.render import render
from diffenc.studies.probes import (
    Done,
    Progress,
    numerics,
    open_encoder,
    per_pass,
    require_distinct,
    side_of,
    with_seed,
)
from diffenc.studies.spreads import Spread, over_seeds
from diffenc.studies.trials import sample_trials

KINDS = ("cross-q", "out", "res-out")
"""Kinds of taps that are compared, by the end of their names."""

_DECODER = (
    "up_blocks.*.attentions.*.transformer_blocks.0.attn2.to_q",
    "up_blocks.*.attentions.*.transformer_blocks.0",
    "up_blocks.*.resnets.*",
)

_Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class TapRegisters:
    """The registers of one tap at one timestep.

    Attributes:
        tap: Place in the U-Net, as a module path.
        timestep: Scheduler step of the noise level.
        count: Number of registers in a picture, mean over pictures, one value per seed.
        pictures: Share of the pictures that have a register, 0 to 1.
        largest: Largest length of a cell over the median length in its picture, mean over pictures.
        first: Share of the variance of all cells that the first principal component has.
        first_without: The same without the registers.
        place: Row and column, as shares of the map from 0 to 1, of the cell that is a register most
            often; None without registers.
        there: Share of all registers that lie at `place`; 0 without registers.
    """

    tap: str
    timestep: int
    count: Spread
    pictures: Spread
    largest: Spread
    first: Spread
    first_without: Spread
    place: tuple[float, float] | None
    there: float


@dataclass(frozen=True, slots=True)
class RegisterStudy:
    """Results of the study.

    Attributes:
        model: Name of the backbone.
        taps: Places in the U-Net, in the order in which they run.
        timesteps: Scheduler steps of the noise levels, in rising order.
        ratio: Factor by which a register exceeds the median length.
        rows: Registers of each tap and timestep.
        settings: Settings of the run, such as numbers of pictures and seeds.
    """

    model: str
    taps: tuple[str, ...]
    timesteps: tuple[int, ...]
    ratio: float
    rows: tuple[TapRegisters, ...]
    settings: dict[str, Any]

    def find(self, tap: str, timestep: int) -> TapRegisters | None:
        """Registers at one place; None where nothing was read."""
        for row in self.rows:
            if (row.tap, row.timestep) == (tap, timestep):
                return row
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)


def study_registers(
    model: "str | Backbone" = "shapes",
    *,
    images: Sequence[Image.Image] | None = None,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[int] = (50, 261),
    ratio: float = REGISTER_RATIO,
    scenes: int = 48,
    seeds: int = 3,
    size: int | None = None,
    batch_size: int = 48,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> RegisterStudy:
    """Find register cells in unconditional features, and tell what they do to principal components.

    Args:
        model: Alias, Hub id or folder of a diffusion model, or a loaded `Backbone`.
        images: Pictures to read; None takes scenes of the miniature world.
        taps: Module paths, globs or names of the taps; None takes the queries of cross-attention,
            the outputs of transformer blocks and of resnets of the decoder.
        timesteps: Scheduler steps of the noise levels, each 0 to 999.
        ratio: Factor above 1 that decides what a register is, see `register_cells`.
        scenes: Number of scenes per seed, 2 or more; unused with `images`.
        seeds: Number of repetitions with other noise, and without `images` other scenes.
        size: Side of the pictures in pixels; None is the backbone's own.
        batch_size: Number of rows (pictures x timesteps) per call of the U-Net.
        device: Device that the model runs on; unused for a `Backbone`.
        dtype: Floating point type of the U-Net; unused for a `Backbone`.
        progress: Function that is called after each batch with the number of pictures that are done
            and the number of all; None reports nothing.

    Raises:
        ConfigError: A number is too small, or a timestep stands twice.
        BackboneError: The model is unknown, missing or broken.
        TapError: A tap does not exist in this model.

    Examples:
        >>> study = study_registers(scenes=4, seeds=1, timesteps=[50])
        >>> study.find("up_blocks.1.attentions.1", 50) is None
        True

    Source:
        Darcet et al. 2024, arXiv:2309.16588. In the taps of Stable Diffusion: the paper's later
        version, arXiv:2507.07106, and its project page.
    """
    whole("scenes", scenes, least=2)
    whole("seeds", seeds, least=1)
    whole("batch_size", batch_size, least=1)
    require_distinct("timesteps", timesteps)
    if images is not None and not images:
        raise ConfigError("got no images; pass one or more, or None for scenes")
    architecture = model if isinstance(model, Backbone) else describe(model)
    encoder = open_encoder(
        model,
        taps=decoder_taps(architecture.taps()) if taps is None else taps,
        timesteps=timesteps,
        size=size,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    count = scenes if images is None else len(images)
    done = Done(progress, seeds * count)
    figures: list[dict[tuple[str, int, str], float]] = []
    places: dict[_Place, Counter[tuple[float, float]]] = {}
    for seed in range(seeds):
        seeded = with_seed(encoder, seed)
        pictures = _scenes(scenes, seed, side_of(encoder)) if images is None else images
        maps = _read(seeded, pictures, done)
        figures.append({})
        for (tap, step), features in maps.items():
            cells = register_cells(features, ratio=ratio)
            for name, value in _figures(features, cells).items():
                figures[-1][tap, step, name] = value
            places.setdefault((tap, step), Counter()).update(_shares(cells))
        encoder.clear_cache()
    spreads = over_seeds(figures)
    rows = []
    for (tap, step), counts in places.items():
        values = {name: spreads[tap, step, name] for name in _NAMES}
        most = counts.most_common(1)
        there = most[0][1] / counts.total() if most else 0.0
        rows.append(
            TapRegisters(tap, step, **values, place=most[0][0] if most else None, there=there)
        )
    return RegisterStudy(
        model=encoder.backbone.name,
        taps=encoder.config.taps or (),
        timesteps=encoder.config.timesteps,
        ratio=float(ratio),
        rows=tuple(rows),
        settings={
            "pictures": count,
            "scenes": images is None,
            "seeds": seeds,
            **numerics(encoder),
        },
    )


_NAMES = ("count", "pictures", "largest", "first", "first_without")


def decoder_taps(known: Sequence[TapInfo]) -> list[str]:
    """Queries of cross-attention, outputs of blocks and of resnets of a decoder, by module path.

    Args:
        known: All taps of the model.

    Raises:
        TapError: The model has none of them.
    """
    paths = []
    for pattern in _DECODER:
        try:
            paths += [tap.name for tap in match_taps([pattern], known)]
        except TapError:
            continue
    if not paths:
        raise TapError("this model has none of the usual taps of a decoder; name taps of its own")
    return paths


def _scenes(count: int, seed: int, side: int) -> list[Image.Image]:
    return [render(trial.scene, side) for trial in sample_trials(count, seed=seed)]


def _read(
    encoder: DiffusionEncoder, images: Sequence[Image.Image], done: Done
) -> dict[_Place, Float[Tensor, "n _c _h _w"]]:
    """Unconditional features of all pictures, per tap and timestep, on the CPU."""
    parts: dict[_Place, list[Tensor]] = {}
    most = per_pass(encoder)
    for start in range(0, len(images), most):
        batch = list(images[start : start + most])
        features = encoder.extract(batch, conditioning="uncond")
        for tap, maps in features.items():
            for index, step in enumerate(encoder.config.timesteps):
                parts.setdefault((tap, step), []).append(maps[:, index].float().cpu())
        done.add(len(batch))
    return {place: torch.cat(each) for place, each in parts.items()}


def _figures(features: Float[Tensor, "n c h w"], cells: Tensor) -> dict[str, float]:
    norms = features.norm(dim=1).flatten(1)
    largest = norms.max(dim=1).values / norms.median(dim=1).values.clamp_min(1e-12)
    counts = cells.flatten(1).sum(dim=1).double()
    rows = rearrange(features, "n c h w -> (n h w) c")
    return {
        "count": float(counts.mean()),
        "pictures": float((counts > 0).double().mean()),
        "largest": float(largest.mean()),
        "first": first_share(rows),
        "first_without": first_share(rows[~cells.flatten()]),
    }


def first_share(rows: Float[Tensor, "n c"]) -> float:
    """Share of the variance that lies along the first principal component; 0 where none varies."""
    centred = rows.double() - rows.double().mean(dim=0)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0)
    total = float(values.sum())
    return float(values[-1]) / total if total > 0 else 0.0


def _shares(cells: Tensor) -> Iterator[tuple[float, float]]:
    """Row and column of each register, as shares of the map from its first to its last cell."""
    height, width = cells.shape[1:]
    for _, row, column in cells.nonzero().tolist():
        yield row / max(1, height - 1), column / max(1, width - 1)


def kind_of(name: str) -> str | None:
    """Kind of a tap by its name in the paper, such as "res-out"; None for others."""
    lower = name.lower()
    return next((kind for kind in reversed(KINDS) if lower.endswith(f"-{kind}")), None)


def mean_count(study: RegisterStudy, kind: str, timestep: int, names: dict[str, str]) -> Spread:
    """Mean number of registers over the taps of a kind, per seed.

    Args:
        study: Results of the study.
        kind: One of `KINDS`.
        timestep: Scheduler step of the noise level.
        names: Name in the paper of each tap.
    """
    rows = [row for row in study.rows if row.timestep == timestep]
    counts = [row.count.values for row in rows if kind_of(names[row.tap]) == kind]
    return Spread(tuple(mean(values) for values in zip(*counts, strict=True)))
