"""How like each other features are: guided and unguided ones, and those of near-same pictures."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from diffenc.checks.arguments import whole
from diffenc.config import check_choice, check_timesteps
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, TapError
from diffenc.evals.matching.base import Item
from diffenc.models import TapInfo, describe, match_taps
from diffenc.models.base import Backbone
from diffenc.models.tap_names import paper_name
from diffenc.studies.cka import guided_cka
from diffenc.studies.near_pairs import ClipVectors, Pool, as_vectors, cosines, open_pairs
from diffenc.studies.probes import (
    Done,
    Progress,
    numerics,
    open_encoder,
    require_distinct,
    with_seed,
)
from diffenc.studies.spreads import Spread, over_seeds

PAPER_TAPS = (
    "D-L2-R0-B0-Cross-Q",
    "U-L1-R1-B0-Cross-Q",
    "U-L1-R1-B0-Out",
    "U-L1-R2-B0-Cross-Q",
    "U-L2-R1-B0-Cross-Q",
    "U-L2-R2-Res-Out",
)
"""The six layers of the paper's later version, table 1."""

TIMESTEPS = (10, 50, 100, 250, 500)
SCALES = (1.0, 1.5, 4.0, 7.0)

PAIR, OWN_NOISE, STRANGERS, CKA = "pair", "own-noise", "strangers", "cka"
CLIP = ("clip-embedding", "clip-tokens")
IMAGE = "image"
"""Stands for the noise level of CLIP, which has none."""

_OTHER_NOISE = 500_000  # seeds from here on are those of the second pictures' own noise

_Place = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class SimilarityFigure:
    """One measured similarity.

    Attributes:
        tap: Name of the place, as the paper has it, or its module path; "clip-embedding" and
            "clip-tokens" are CLIP's.
        measure: "cka" between unconditional and guided features; mean cosine of the two pictures of
            a "pair" under one noise, under noises of their own ("own-noise"), and of "strangers",
            pictures of different pairs, under one noise.
        at: Guidance scale of "cka", timestep of the cosines, as text; "image" for CLIP.
        value: CKA or cosine, one per seed.
    """

    tap: str
    measure: str
    at: str
    value: Spread


@dataclass(frozen=True, slots=True)
class SimilarityStudy:
    """Results of the study.

    Attributes:
        model: Name of the backbone.
        data: Name of the pairs.
        clip: Name of the CLIP; None without one.
        taps: Module path of each tap, by its name in the figures.
        timesteps: Scheduler steps of the cosines, in rising order.
        cka_timestep: Scheduler step of the CKA.
        guidance_scales: Guidance scales of the CKA, in rising order.
        figures: Every measured similarity.
        settings: Settings of the run, such as numbers of pairs and seeds.
    """

    model: str
    data: str
    clip: str | None
    taps: dict[str, str]
    timesteps: tuple[int, ...]
    cka_timestep: int
    guidance_scales: tuple[float, ...]
    figures: tuple[SimilarityFigure, ...]
    settings: dict[str, Any]

    def find(self, tap: str, measure: str, at: float | str) -> Spread | None:
        """A similarity; None where it was not measured.

        Args:
            tap: Name of the place in the figures.
            measure: "cka", "pair", "own-noise" or "strangers".
            at: Guidance scale or timestep; "image" for CLIP.
        """
        place = (tap, measure, at if isinstance(at, str) else f"{at:g}")
        for each in self.figures:
            if (each.tap, each.measure, each.at) == place:
                return each.value
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)


def study_similarity(
    model: "str | Backbone" = "shapes",
    *,
    data: "str | os.PathLike[str]" = "shapes",
    clip: str | None = "shapes-clip",
    taps: Sequence[str] | None = None,
    timesteps: Sequence[int] = TIMESTEPS,
    cka_timestep: int = 50,
    guidance_scales: Sequence[float] = SCALES,
    pool: Pool = "flat",
    per_pattern: int = 15,
    seeds: int = 3,
    size: int | None = None,
    batch_size: int = 40,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> SimilarityStudy:
    """Measure how guidance changes features, and how alike those of near-same pictures are.

    Pictures are those of MMVP-VLM, pairs that differ in one thing, or of its miniature twin. CKA is
    between the unconditional features of all pictures and those guided by each picture's own
    caption. Cosines are between the unconditional features of the two pictures of a pair, beside
    the same for CLIP.

    The paper states neither the pooling nor whether a pair shares its noise. Both are measured for
    noise; pooling is an option. The features of all pictures at `cka_timestep` are held in memory:
    for SD 2.1, the paper's taps and 270 pictures at 512 pixels, 6 GB.

    Args:
        model: Alias, Hub id or folder of a diffusion model, or a loaded `Backbone`.
        data: "shapes", or a folder or .zip file of MMVP-VLM.
        clip: Name or folder of a CLIP; None leaves CLIP out.
        taps: Module paths, globs or names of the taps; None takes the paper's six layers, and
            where a level has fewer repeats than that its last, or leaves it out.
        timesteps: Scheduler steps of the cosines, each 0 to 999.
        cka_timestep: Scheduler step of the CKA.
        guidance_scales: Guidance scales s of f_u + s (f_c - f_u) that f_u is compared with.
        pool: How a map becomes a vector: "flat" puts all cells in a row, "mean" averages them.
        per_pattern: Number of pairs for each pattern, 2 or more in all.
        seeds: Number of repetitions with other noise, and in miniature other scenes.
        size: Side of the pictures in pixels; None is the backbone's own.
        batch_size: Number of rows (pictures x timesteps) per call of the U-Net.
        device: Device that the models run on; unused for a `Backbone`.
        dtype: Floating point type of the U-Net; unused for a `Backbone`.
        progress: Function that is called after each batch with the number of pairs that are done
            and the number of all pairs; None reports nothing.

    Raises:
        ConfigError: A number is too small, a timestep or scale stands twice, or the data is broken.
        BackboneError: A model is unknown, missing or broken.
        TapError: A tap does not exist in this model, or none of the paper's does.

    Examples:
        >>> study = study_similarity(per_pattern=2, seeds=1)
        >>> study.find("U-L1-R1-B0-Cross-Q", "cka", 7).mean < 1
        True

    Source:
        The paper's later version, arXiv:2507.07106. MMVP-VLM: Tong et al. 2024, arXiv:2401.06209.
        CKA: Kornblith et al. 2019, arXiv:1905.00414.
    """
    whole("per_pattern", per_pattern, least=1)
    whole("seeds", seeds, least=1)
    whole("batch_size", batch_size, least=1)
    check_choice("pool", pool, get_args(Pool))
    require_distinct("timesteps", timesteps)
    require_distinct("guidance_scales", guidance_scales)
    scales = tuple(sorted(float(scale) for scale in guidance_scales))
    if not all(map(math.isfinite, scales)):
        raise ConfigError(f"guidance_scales must be finite, got {list(scales)}")
    check_timesteps([whole("cka_timestep", cka_timestep, least=0)])
    architecture = model if isinstance(model, Backbone) else describe(model)
    encoder = open_encoder(
        model,
        taps=paper_taps(architecture.taps()) if taps is None else taps,
        timesteps=timesteps,
        size=size,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    clip_vectors = None if clip is None else ClipVectors(clip, encoder.device, pool)
    runs: list[dict[_Place, float]] = []
    done: Done | None = None
    for seed in range(seeds):
        pairs = open_pairs(data, per_pattern=per_pattern, seed=seed)
        if done is None:
            done = Done(progress, seeds * len(pairs))
        run = _Run(with_seed(encoder, seed), pairs, pool=pool, done=done)
        runs.append(
            {
                **run.alignments(cka_timestep, scales),
                **run.likenesses(),
                **({} if clip_vectors is None else run.likenesses_of(clip_vectors)),
            }
        )
        encoder.clear_cache()
    return SimilarityStudy(
        model=encoder.backbone.name,
        data="shapes" if os.fspath(data) == "shapes" else "MMVP-VLM",
        clip=clip,
        taps={paper_name(tap): tap for tap in encoder.config.taps or ()},
        timesteps=encoder.config.timesteps,
        cka_timestep=cka_timestep,
        guidance_scales=scales,
        figures=tuple(SimilarityFigure(*place, each) for place, each in over_seeds(runs).items()),
        settings={"pairs": len(pairs), "seeds": seeds, "pool": pool, **numerics(encoder)},
    )


def paper_taps(known: Sequence[TapInfo]) -> list[str]:
    """The paper's six layers as module paths, or the last repeats of their levels; each once.

    Args:
        known: All taps of the model.

    Raises:
        TapError: The model has none of them.
    """
    paths: dict[str, None] = {}
    for name in PAPER_TAPS:
        head, repeat, rest = name[:6], int(name[6]), name[7:]
        for fewer in range(repeat, -1, -1):
            try:
                (tap,) = match_taps([f"{head}{fewer}{rest}"], known)
            except TapError:
                continue
            paths[tap.name] = None
            break
    if not paths:
        raise TapError("this model has none of the paper's layers; name taps of its own")
    return list(paths)


class _Run:
    """The measurements of one seed."""

    def __init__(
        self, encoder: DiffusionEncoder, pairs: Sequence[Item], *, pool: Pool, done: Done
    ) -> None:
        self._encoder, self._pairs, self._pool, self._done = encoder, pairs, pool, done
        seed = encoder.config.seed
        self._other = with_seed(encoder, _OTHER_NOISE + seed)

    def _batches(self, rows: int) -> list[Sequence[Item]]:
        """Pairs in order, with so many rows for each."""
        most = max(1, (self._encoder.config.batch_size or 1) // rows)
        return [self._pairs[start : start + most] for start in range(0, len(self._pairs), most)]

    def alignments(self, timestep: int, scales: tuple[float, ...]) -> dict[_Place, float]:
        """CKA of unconditional and guided features, per tap and scale."""
        config = replace(self._encoder.config, timestep=timestep)
        encoder = DiffusionEncoder(self._encoder.backbone, config)
        halves: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        for batch in self._batches(4):
            images = [image for item in batch for image in _pictures(item)]
            captions = [caption for item in batch for caption in item.captions]
            features = encoder.extract(images, captions, conditioning="cfg")
            uncond, cond = features.select("uncond"), features.select("cond")
            for tap in features:
                for half, maps in zip(
                    halves.setdefault(tap, ([], [])), (uncond, cond), strict=True
                ):
                    half.append(as_vectors(maps[tap], self._pool))
        return {
            (paper_name(tap), CKA, f"{scale:g}"): value
            for tap, (uncond, cond) in halves.items()
            for scale, value in zip(
                scales, guided_cka(torch.cat(uncond), torch.cat(cond), scales), strict=True
            )
        }

    def likenesses(self) -> dict[_Place, float]:
        """Mean cosines of unconditional features, per tap and timestep."""
        means = _Means()
        steps = self._encoder.config.timesteps
        for batch in self._batches(2 * len(steps)):
            first, second = (list(each) for each in zip(*map(_pictures, batch), strict=True))
            plain, near = (self._encoder.extract(each) for each in (first, second))
            apart = self._other.extract(second)
            for tap in plain:
                one, two, other = (as_vectors(e[tap], self._pool) for e in (plain, near, apart))
                for index, step in enumerate(steps):
                    place = (paper_name(tap), str(step))
                    means.add(place, one[:, index], two[:, index], other[:, index])
            self._done.add(len(batch))
        return means.values()

    def likenesses_of(self, vectors: ClipVectors) -> dict[_Place, float]:
        """Mean cosines of CLIP's vectors."""
        means = _Means()
        for batch in self._batches(2):
            first, second = (list(each) for each in zip(*map(_pictures, batch), strict=True))
            one, two = vectors(first), vectors(second)
            for name in one:
                means.add((name, IMAGE), one[name], two[name], None)
        return means.values()


class _Means:
    """Mean cosines at several places, collected from batches of pairs in their order."""

    def __init__(self) -> None:
        self._cosines: dict[_Place, list[Tensor]] = {}
        self._before: dict[tuple[str, str], Tensor] = {}

    def add(self, place: tuple[str, str], one: Tensor, two: Tensor, other: Tensor | None) -> None:
        """Add vectors of both pictures, and of the second under another noise."""
        tap, at = place
        self._keep((tap, PAIR, at), one, two)
        if other is not None:
            self._keep((tap, OWN_NOISE, at), one, other)
        # The first picture of the pair before and the second of this one, across batches.
        before = torch.cat([*([self._before[place]] if place in self._before else []), one[:-1]])
        if len(before):
            self._keep((tap, STRANGERS, at), before, two[-len(before) :])
        self._before[place] = one[-1:]

    def _keep(self, place: _Place, first: Tensor, second: Tensor) -> None:
        self._cosines.setdefault(place, []).append(cosines(first, second))

    def values(self) -> dict[_Place, float]:
        """The means."""
        return {place: float(torch.cat(parts).mean()) for place, parts in self._cosines.items()}


def _pictures(item: Item) -> tuple[Image.Image, Image.Image]:
    first, second = item.pictures
    return first.open(), second.open()
