"""Depth maps: normals from depth, and how far predictions are from the truth."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def normals_of(
    depth: Float[Tensor, "height width"], focal: float
) -> Float[Tensor, "3 height width"]:
    """Unit normals of the surface that a depth map shows, looking at the camera.

    Differences are taken between the neighbours on both sides; pixels with an unknown neighbour,
    and those at the border, have none.

    Args:
        depth: Distance along the camera's axis; 0 where it is unknown.
        focal: Focal length in pixels; the axis goes through the middle of the picture.

    Returns:
        Vectors (right, down, into the picture), 0 where the normal is unknown.
    """
    height, width = depth.shape
    place: dict[str, Any] = {"dtype": depth.dtype, "device": depth.device}
    x = (torch.arange(width, **place) + 0.5 - width / 2) / focal
    y = (torch.arange(height, **place) + 0.5 - height / 2) / focal
    points = torch.stack([x[None, :] * depth, y[:, None] * depth, depth])
    across = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
    down = points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    known = F.max_pool2d((depth <= 0).float()[None, None], 3, stride=1)[0, 0] == 0
    inner = F.normalize(torch.linalg.cross(down, across, dim=0), dim=0) * known
    return F.pad(inner, (1, 1, 1, 1))


def depth_errors(predicted: Float[Tensor, " n"], depth: Float[Tensor, " n"]) -> dict[str, float]:
    """Share of pixels within 1.25 times of the true depth, and the root of the mean squared error.

    Args:
        predicted: Predicted depth, above 0.
        depth: True depth, above 0, in metres.

    Source:
        Eigen et al. 2014, arXiv:1406.2283, section 4.1 (delta < 1.25).
    """
    ratio = torch.maximum(predicted / depth, depth / predicted)
    return {
        "depth_delta1": float((ratio < 1.25).double().mean()),
        "depth_rmse": float((predicted - depth).square().mean().sqrt()),
    }


def normal_errors(
    predicted: Float[Tensor, "3 n"], normals: Float[Tensor, "3 n"]
) -> dict[str, float]:
    """Share of pixels whose normal is off by less than 11.25 degrees, and the median angle.

    Args:
        predicted: Predicted directions, of any length.
        normals: True unit normals.

    Source:
        Fouhey et al. 2013, Data-driven 3D primitives for single image understanding (11.25
        degrees).
    """
    cosine = (F.normalize(predicted, dim=0) * normals).sum(dim=0).clamp(-1, 1)
    angles = cosine.acos() * (180 / math.pi)
    return {
        "normals_11": float((angles < 11.25).double().mean()),
        "normals_median": float(angles.median()),
    }
