"""Figures of every place of a model, tap by timestep by text, from tasks on dense features."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffenc.encoder import DiffusionEncoder
from diffenc.evals.dense.data import DepthPicture, LabelledPicture, PointPair
from diffenc.evals.dense.linear_heads import CellStatistics
from diffenc.evals.dense.points import hits, match_points, pck
from diffenc.evals.dense.surfaces import depth_errors, normal_errors
from diffenc.inputs.images import ImageSource
from diffenc.memory.cache import TensorCache, recall
from diffenc.studies.features import study_features
from diffenc.studies.probes import per_pass
from diffenc.studies.trials import PROPERTIES

Text = Literal["none", "text"]
TEXTS: tuple[Text, ...] = get_args(Text)

Place: TypeAlias = tuple[str, int, Text]
"""Tap, timestep, and whether features were read under a text."""

Figures: TypeAlias = dict[Place, dict[str, float]]

_KEPT_BYTES = 4 * 2**30  # features of pictures that stand in several pairs


class Measure(Protocol):
    """A task that gives one or several figures at every place."""

    @property
    def name(self) -> str:
        """Beginning of the names of the figures."""

    @property
    def total(self) -> int:
        """Number of steps that `measure` reports."""

    def measure(
        self, encoder: DiffusionEncoder, texts: Sequence[Text], done: Callable[[int], object]
    ) -> Figures:
        """Read features at all taps and timesteps of an encoder, and measure.

        Args:
            encoder: Encoder with its taps and a tuple of timesteps.
            texts: Texts to read under.
            done: Function that is called with the number of steps that were finished.
        """


def read_places(
    encoder: DiffusionEncoder,
    images: Sequence[ImageSource],
    captions: Sequence[str],
    texts: Sequence[Text],
) -> Iterator[tuple[Place, Float[Tensor, "b c _h _w"]]]:
    """Features of some pictures at every place, on the CPU."""
    for text in texts:
        if text == "none":
            features = encoder.extract(list(images), None, conditioning="uncond")
        else:
            features = encoder.extract(list(images), list(captions), conditioning="cond")
        for tap, maps in features.items():
            for index, timestep in enumerate(encoder.config.timesteps):
                yield (tap, timestep, text), maps[:, index].float().cpu()


def kept_places(
    encoder: DiffusionEncoder, texts: Sequence[Text]
) -> Callable[
    [Sequence[str], Sequence[ImageSource], Sequence[str]], dict[Place, list[Float[Tensor, "c h w"]]]
]:
    """A function that reads pictures at every place, given names, pictures and captions.

    Features are kept by the names, for pictures that stand in several pairs.
    """
    cache, places = TensorCache(_KEPT_BYTES), list[Place]()

    def read(
        names: Sequence[str], images: Sequence[ImageSource], captions: Sequence[str]
    ) -> dict[Place, list[Tensor]]:
        def compute(rows: list[int]) -> list[tuple[Tensor, ...]]:
            chosen = [images[row] for row in rows], [captions[row] for row in rows]
            maps = dict(read_places(encoder, *chosen, texts))
            places[:] = maps
            return list(zip(*(each.unbind() for each in maps.values()), strict=True))

        rows = recall(cache, names, compute)
        return {place: [row[index] for row in rows] for index, place in enumerate(places)}

    return read


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Share of points that are found in another picture by the nearest feature.

    Attributes:
        name: Beginning of the names of the figures.
        pairs: Pairs of pictures with points.
        share: Allowed distance as a share of the object's box.
    """

    name: str
    pairs: Sequence[PointPair]
    share: float = 0.1

    @property
    def total(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def measure(
        self, encoder: DiffusionEncoder, texts: Sequence[Text], done: Callable[[int], object]
    ) -> Figures:
        """See `Measure`."""
        correct: defaultdict[Place, list[Tensor]] = defaultdict(list)
        read = kept_places(encoder, texts)
        pairs = sorted(self.pairs, key=lambda pair: (pair.category, pair.names))
        most = max(1, per_pass(encoder) // 2)
        for start in range(0, len(pairs), most):
            batch = pairs[start : start + most]
            maps = read(
                [name for pair in batch for name in pair.names],
                [image for pair in batch for image in pair.images],
                [caption for pair in batch for caption in pair.captions],
            )
            for place, each in maps.items():
                for pair, first, second in zip(batch, each[::2], each[1::2], strict=True):
                    points = match_points(first, second, pair.first_points, pair.second_size)
                    correct[place].append(hits(pair, points, self.share))
            done(len(batch))
        return {place: named(self.name, pck(each)) for place, each in correct.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """What a linear head, fitted to some pictures, tells of the cells of others.

    Attributes:
        name: Beginning of the names of the figures.
        train: Pictures that the head is fitted to.
        test: Pictures that it is measured on.
        classes: Number of classes; 0 is the background.
        figure: Kind of figure: "miou", the mean intersection over union of the classes but the
            background, or "depth_order", the share of pictures in which class 2 is deemed nearer
            than class 1.
    """

    name: str
    train: Sequence[LabelledPicture]
    test: Sequence[LabelledPicture]
    classes: int
    figure: Literal["miou", "depth_order"] = "miou"

    @property
    def total(self) -> int:
        """Number of pictures."""
        return len(self.train) + len(self.test)

    def measure(
        self, encoder: DiffusionEncoder, texts: Sequence[Text], done: Callable[[int], object]
    ) -> Figures:
        """See `Measure`."""
        statistics: defaultdict[Place, CellStatistics] = defaultdict(CellStatistics)
        for batch in _batches(self.train, encoder):
            labels = torch.stack([picture.labels for picture in batch])
            targets = rearrange(F.one_hot(labels, self.classes), "b h w k -> b k h w").float()
            for place, maps in _read(encoder, batch, texts):
                statistics[place].add(maps, targets)
            done(len(batch))
        heads = {place: each.classifier() for place, each in statistics.items()}
        scores: defaultdict[Place, list[Tensor]] = defaultdict(list)
        for batch in _batches(self.test, encoder):
            grid = (batch[0].labels.shape[0], batch[0].labels.shape[1])
            for place, maps in _read(encoder, batch, texts):
                scores[place].append(heads[place](maps, grid))
            done(len(batch))
        truth = torch.stack([picture.labels for picture in self.test])
        count = mean_iou if self.figure == "miou" else order_share
        return {
            place: named(self.name, {self.figure: count(torch.cat(each), truth)})
            for place, each in scores.items()
        }


def mean_iou(scores: Float[Tensor, "n classes h w"], truth: Float[Tensor, "n h w"]) -> float:
    """Intersection over union of each class but the background, over all cells; their mean."""
    predicted = scores.argmax(dim=1)
    return mean(
        float(
            ((predicted == k) & (truth == k)).sum()
            / ((predicted == k) | (truth == k)).sum().clamp(1)
        )
        for k in range(1, scores.shape[1])
    )


def order_share(scores: Float[Tensor, "n classes h w"], truth: Float[Tensor, "n h w"]) -> float:
    """Share of pictures in which the object in front is deemed nearer, mean over its cells."""
    steps = torch.arange(scores.shape[1], dtype=scores.dtype, device=scores.device)
    depth = torch.einsum("nkhw,k->nhw", scores.softmax(dim=1), steps)
    return mean(
        float(each[order == 2].mean() > each[order == 1].mean())
        for each, order in zip(depth, truth, strict=True)
        if (order == 1).any() and (order == 2).any()
    )


@dataclass(frozen=True, slots=True, eq=False)
class Depth:
    """What linear heads tell of depth and normals: of the logarithm of depth, and of directions.

    Attributes:
        name: Beginning of the names of the figures.
        train: Pictures that the heads are fitted to.
        test: Pictures that they are measured on; each counts the same.
    """

    name: str
    train: Sequence[DepthPicture]
    test: Sequence[DepthPicture]

    @property
    def total(self) -> int:
        """Number of pictures."""
        return len(self.train) + len(self.test)

    def measure(
        self, encoder: DiffusionEncoder, texts: Sequence[Text], done: Callable[[int], object]
    ) -> Figures:
        """See `Measure`."""
        depths: defaultdict[Place, CellStatistics] = defaultdict(CellStatistics)
        normals: defaultdict[Place, CellStatistics] = defaultdict(CellStatistics)
        for picture in self.train:
            truth = picture.surface()
            known = (truth.depth > 0).float()
            logarithm = truth.depth.clamp_min(1e-6).log()
            looks = (truth.normals.abs().sum(dim=0) > 0).float()
            for place, maps in read_places(encoder, [picture.image()], [picture.caption], texts):
                depths[place].add(maps, logarithm[None, None], known[None])
                normals[place].add(maps, truth.normals[None], looks[None])
            done(1)
        heads = {place: (depths[place].regressor(), normals[place].regressor()) for place in depths}
        figures: defaultdict[Place, defaultdict[str, list[float]]]
        figures = defaultdict(lambda: defaultdict(list))
        for picture in self.test:
            truth = picture.surface()
            grid = (truth.depth.shape[0], truth.depth.shape[1])
            known, looks = truth.depth > 0, truth.normals.abs().sum(dim=0) > 0
            for place, maps in read_places(encoder, [picture.image()], [picture.caption], texts):
                depth, directions = (head(maps, grid)[0] for head in heads[place])
                errors = depth_errors(depth[0].exp()[known], truth.depth[known].double())
                errors |= normal_errors(directions[:, looks], truth.normals[:, looks].double())
                for key, value in errors.items():
                    figures[place][key].append(value)
            done(1)
        return {
            place: named(self.name, {key: mean(values) for key, values in each.items()})
            for place, each in figures.items()
        }


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Accuracy of linear readouts of colour, shape, position and number, their mean.

    Under a text each is read under a question after it, which does not give it away.

    Attributes:
        name: Beginning of the name of the figure.
        scenes: Number of scenes, of which two thirds are fitted to.
    """

    name: str
    scenes: int

    @property
    def total(self) -> int:
        """Number of scenes."""
        return self.scenes

    def measure(
        self, encoder: DiffusionEncoder, texts: Sequence[Text], done: Callable[[int], object]
    ) -> Figures:
        """See `Measure`."""
        words: Mapping[Text, Literal["uncond", "question"]] = {"none": "uncond", "text": "question"}
        before = 0

        def report(finished: int, _total: int) -> None:
            nonlocal before
            done(finished - before)
            before = finished

        config = encoder.config
        study = study_features(
            encoder.backbone,
            taps=config.taps,
            timesteps=config.timesteps,
            conditionings=[words[text] for text in texts],
            scenes=self.scenes,
            focus_scenes=0,
            seeds=1,
            size=config.size if isinstance(config.size, int) else None,
            batch_size=config.batch_size or 1,
            progress=report,
        )
        figures: Figures = {}
        for tap in study.taps:
            for timestep in study.timesteps:
                for text in texts:
                    shares = [study.find(p, words[text], tap, timestep) for p in PROPERTIES]
                    accuracy = mean(share.mean for share in shares if share is not None)
                    figures[tap, timestep, text] = {f"{self.name}_probe": accuracy}
        return figures


def named(name: str, figures: Mapping[str, float]) -> dict[str, float]:
    """Figures under names that begin with the name of their task."""
    return {f"{name}_{key}": value for key, value in figures.items()}


def _batches(
    pictures: Sequence[LabelledPicture], encoder: DiffusionEncoder
) -> Iterator[Sequence[LabelledPicture]]:
    most = per_pass(encoder)
    for start in range(0, len(pictures), most):
        yield pictures[start : start + most]


def _read(
    encoder: DiffusionEncoder, batch: Sequence[LabelledPicture], texts: Sequence[Text]
) -> Iterator[tuple[Place, Tensor]]:
    images = [picture.image for picture in batch]
    return read_places(encoder, images, [picture.caption for picture in batch], texts)
