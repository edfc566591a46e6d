"""Points of one picture found in another by the nearest feature."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from diffenc.evals.dense.data import PointPair

_CHANNELS = 64  # interpolated at a time: all channels at every pixel would take gigabytes


def match_points(
    first: Float[Tensor, "c _h _w"],
    second: Float[Tensor, "c _h2 _w2"],
    points: Float[Tensor, "points 2"],
    size: tuple[int, int],
) -> Float[Tensor, "points 2"]:
    """Where points of a picture are found in another, by cosine, without any training.

    Args:
        first: Features of the picture that the points lie in.
        second: Features of the picture that is searched.
        points: Points in the first picture: x and y as shares of its width and height.
        size: Height and width, in pixels, of the grid of candidates in the second picture.

    Returns:
        Centres of the pixels that fit best, as shares of width and height.

    Source:
        Tang et al. 2023 (DIFT), arXiv:2306.03881, section 4: features are interpolated to pixels
        and the nearest one is taken.
    """
    height, width = size
    queries = F.grid_sample(
        first[None], (2 * points - 1)[None, None], mode="bilinear", align_corners=False
    )[0, :, 0]
    queries = F.normalize(queries, dim=0)
    products = second.new_zeros(len(points), height, width)
    squares = second.new_zeros(height, width)
    for start in range(0, len(second), _CHANNELS):
        channels = slice(start, start + _CHANNELS)
        keys = F.interpolate(second[None, channels], size, mode="bilinear", align_corners=False)[0]
        products += torch.einsum("cp,chw->phw", queries[channels], keys)
        squares += keys.square().sum(dim=0)
    best = (products / squares.sqrt().clamp_min(1e-12)).flatten(1).argmax(dim=1)
    places = torch.stack([best % width, best // width], dim=1) + 0.5
    sides = torch.tensor([width, height], dtype=places.dtype, device=places.device)
    matches: Tensor = places / sides
    return matches


def hits(
    pair: PointPair, matches: Float[Tensor, "points 2"], share: float
) -> Bool[Tensor, " points"]:
    """Which points were found: no farther from the truth than a share of the object's box.

    Args:
        pair: Pair of pictures with the true points.
        matches: Points that were found, as `match_points` returns them.
        share: Allowed distance as a share of the longer side of the box.
    """
    height, width = pair.second_size
    pixels = torch.tensor([width, height], dtype=torch.float32, device="cpu")
    distances = ((matches.float().cpu() - pair.second_points) * pixels).norm(dim=1)
    within: Tensor = distances <= share * pair.box
    return within


def pck(correct: Sequence[Bool[Tensor, " points"]]) -> dict[str, float]:
    """Percentage of correct keypoints, as shares: over all points, and as a mean over pictures.

    Args:
        correct: Which points were found, for each pair.

    Source:
        Min et al. 2019 (SPair-71k), arXiv:1908.10543: the mean over pairs. DIFT's tables count all
        points alike.
    """
    some = [each for each in correct if len(each)]
    if not some:
        return {}
    means = torch.stack([each.float().mean() for each in some])
    return {"pck": float(torch.cat(some).float().mean()), "pck_image": float(means.mean())}
