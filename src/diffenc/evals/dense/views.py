"""Surfaces that two views show: cells matched by their features, errors measured in space."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from diffenc.evals.dense.data import Sighting

GRID = 128
"""Cells on a side of the grid that a view's surface is looked at on."""

MOST = 1000
"""Matches of a pair that count: those that stand out most from the second best."""

PIXELS = 512
"""Side in pixels that a view's picture counts as, for errors in pixels."""

_METRES = {"1cm": 0.01, "2cm": 0.02, "5cm": 0.05}
_DISTANCES = {"5px": 5.0, "25px": 25.0, "50px": 50.0}
_ANGLES = (0, 30, 60, 90, 120)
_ROWS = 1024  # cells that are compared with all others at a time


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """How far the matches of a pair are off.

    Attributes:
        metres: Distance of both points in space.
        pixels: Distance of both points in the second picture, as if that had 512 pixels a side.
        angle: Angle between both views in degrees.
    """

    metres: Float[Tensor, " matches"]
    pixels: Float[Tensor, " matches"]
    angle: float


def match_cells(
    first: Float[Tensor, "n c"], second: Float[Tensor, "m c"], most: int = MOST
) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"]]:
    """For each cell of a view the most similar one of another; the matches that are least doubtful.

    Args:
        first: Features of the cells of one view.
        second: Features of the cells of the other one, two or more.
        most: Largest number of matches.

    Returns:
        Rows of the matched cells in both, the least doubtful match first.

    Source:
        El Banani et al. 2024 (Probe3D), arXiv:2404.08636: cosine, and Lowe's ratio of the
        distances of the best and the second best.
    """
    keys = F.normalize(second, dim=1)
    distances, places = [], []
    for rows in first.split(_ROWS):
        cosines, best = (F.normalize(rows, dim=1) @ keys.T).topk(2, dim=1)
        distances.append((1 - cosines).clamp_min(1e-9))
        places.append(best[:, 0])
    near = torch.cat(distances)
    chosen = (1 - near[:, 0] / near[:, 1]).topk(min(most, len(near))).indices
    return chosen, torch.cat(places)[chosen]


def matches_of(
    sightings: tuple[Sighting, Sighting],
    maps: tuple[Float[Tensor, "c _h _w"], Float[Tensor, "c _h2 _w2"]],
    *,
    most: int = MOST,
) -> Matches | None:
    """Match the surfaces of two views by their features, and measure how far matches are off.

    Args:
        sightings: What both pictures show in space.
        maps: Features of both pictures.
        most: Largest number of matches.

    Returns:
        None where one of the pictures shows less than two cells of the object.

    Source:
        El Banani et al. 2024 (Probe3D), arXiv:2404.08636, and its released code.
    """
    first, second = sightings
    there = [each.points[2] > 0 for each in sightings]
    if min(int(each.sum()) for each in there) < 2:
        return None
    rows = match_cells(_cells(maps[0], there[0]), _cells(maps[1], there[1]), most)
    source, target = (
        each.points[:, mask].T[row.cpu()].double()
        for each, mask, row in zip(sightings, there, rows, strict=True)
    )
    rotation = second.rotation.double() @ first.rotation.double().T
    moved = (source - first.translation.double()) @ rotation.T + second.translation.double()
    return Matches(
        metres=(moved - target).norm(dim=1),
        pixels=PIXELS * second.focal * (_projected(moved) - _projected(target)).norm(dim=1),
        angle=rotation_angle(rotation),
    )


def _cells(
    maps: Float[Tensor, "c _h _w"], there: Bool[Tensor, "height width"]
) -> Float[Tensor, "n c"]:
    """Features at the cells where there is something."""
    grid = (there.shape[0], there.shape[1])
    fine = F.interpolate(maps[None].float(), grid, mode="bicubic", align_corners=False)[0]
    return fine[:, there.to(fine.device)].T


def _projected(points: Float[Tensor, "n 3"]) -> Float[Tensor, "n 2"]:
    return points[:, :2] / points[:, 2:].clamp_min(1e-9)


def rotation_angle(rotation: Float[Tensor, "3 3"]) -> float:
    """Angle in degrees by which a rotation turns."""
    cosine = (rotation.double().trace() - 1) / 2
    return float(torch.rad2deg(cosine.clamp(-1, 1).acos()))


def recalls(pairs: Sequence[Matches]) -> dict[str, float]:
    """Share of matches within 1, 2 and 5 cm, and within 5, 25 and 50 pixels, mean over pairs.

    Those within 2 cm also by the angle between the views. A range of angles without any pair has
    no figure.

    Args:
        pairs: Matches of each pair.

    Source:
        El Banani et al. 2024 (Probe3D), arXiv:2404.08636.
    """
    if not pairs:
        return {}
    figures = {
        **_shares([pair.metres for pair in pairs], _METRES),
        **_shares([pair.pixels for pair in pairs], _DISTANCES),
    }
    for low, high in pairwise(_ANGLES):
        some = [pair.metres for pair in pairs if low <= pair.angle < high]
        if some:
            figures[f"recall_2cm_{low}_{high}"] = _shares(some, _METRES)["recall_2cm"]
    return figures


def _shares(errors: Sequence[Tensor], limits: Mapping[str, float]) -> dict[str, float]:
    return {
        f"recall_{name}": float(torch.stack([(e < most).double().mean() for e in errors]).mean())
        for name, most in limits.items()
    }
