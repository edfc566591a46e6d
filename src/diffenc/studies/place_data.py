"""Data for the table of places by name: the miniature world, SPair-71k, NYU and NAVI."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffenc.checks.arguments import whole
from diffenc.errors import ConfigError, near_matches
from diffenc.evals.dense.miniature import (
    HELD_OUT,
    labelled,
    order_of_cells,
    overlapping_scenes,
    point_pairs,
    shape_of_cells,
)
from diffenc.evals.dense.navi import load_navi, load_navi_pairs
from diffenc.evals.dense.nyu import load_nyu
from diffenc.evals.dense.spair import load_spair
from diffenc.shapes.scenes import SHAPES, sample_scenes
from diffenc.studies.place_views import Views
from diffenc.studies.places import Depth, Labels, Measure, Points, Probe

_CELLS = 32  # side of the grid of classes
_TRAIN = 960_000  # seed of scenes that heads are fitted to; held out from the model, too


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of the data is used.

    Attributes:
        scenes: Scenes of the miniature world to fit to; a third as many are measured on.
        pairs: Pairs of miniature pictures.
        most: Largest number of pairs or pictures of a dataset that are measured on, and twice as
            many pictures that are fitted to; None takes all.
    """

    scenes: int = 120
    pairs: int = 60
    most: int | None = None

    def __post_init__(self) -> None:
        whole("scenes", self.scenes, least=30)
        whole("pairs", self.pairs, least=1)
        if self.most is not None:
            whole("most", self.most, least=1)


def measures_of(entry: str, side: int, extent: Extent | None = None) -> list[Measure]:
    """Tasks of a dataset.

    Args:
        entry: "shapes", or a name and a folder: "spair=FOLDER", "nyu=FOLDER" or "navi=FOLDER".
        side: Side of the miniature's pictures in pixels.
        extent: How much of the data is used.

    Raises:
        ConfigError: An unknown name, a missing folder, or files that are not that dataset's.
    """
    extent = extent or Extent()
    name, _, folder = entry.partition("=")
    if name == "shapes" and not folder:
        return _shapes(side, extent)
    if name not in _DATASETS:
        known = ["shapes", *(f"{each}=FOLDER" for each in _DATASETS)]
        raise ConfigError(
            f"unknown data {entry!r}; known are {', '.join(known)}.{near_matches(name, _DATASETS)}"
        )
    if not folder:
        raise ConfigError(f"{name} is read from a folder: write {name}=FOLDER, got {entry!r}")
    return list(_DATASETS[name](Path(folder), extent))


def _shapes(side: int, extent: Extent) -> list[Measure]:
    tests = max(10, extent.scenes // 3)
    several = [
        list(sample_scenes(count, seed=seed))
        for count, seed in ((extent.scenes, _TRAIN), (tests, HELD_OUT))
    ]
    hidden = [
        overlapping_scenes(count, seed=seed)
        for count, seed in ((extent.scenes, _TRAIN), (tests, HELD_OUT))
    ]
    shapes = [labelled(s, [shape_of_cells(e, side, _CELLS) for e in s], side) for s in several]
    orders = [labelled(s, [order_of_cells(e, side, _CELLS) for e in s], side) for s in hidden]
    return [
        Probe("shapes", extent.scenes),
        Points("shapes", point_pairs(extent.pairs, side)),
        Labels("shapes", shapes[0], shapes[1], 1 + len(SHAPES)),
        Labels("shapes", orders[0], orders[1], 3, "depth_order"),
    ]


def _spair(folder: Path, extent: Extent) -> list[Measure]:
    return [Points("spair", load_spair(folder, most=extent.most))]


def _nyu(folder: Path, extent: Extent) -> list[Measure]:
    train = load_nyu(folder, split="train", most=_twice(extent.most))
    return [Depth("nyu", train, load_nyu(folder, most=extent.most))]


def _navi(folder: Path, extent: Extent) -> list[Measure]:
    train = load_navi(folder, split="train", most=_twice(extent.most))
    return [
        Depth("navi", train, load_navi(folder, most=extent.most)),
        Views("navi", load_navi_pairs(folder, most=extent.most)),
    ]


def _twice(most: int | None) -> int | None:
    return None if most is None else 2 * most


_DATASETS: dict[str, Callable[[Path, Extent], Sequence[Measure]]] = {
    "spair": _spair,
    "nyu": _nyu,
    "navi": _navi,
}
