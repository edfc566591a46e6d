"""What lies on each patch of a picture, which vision towers and language models learn by."""

import torch
from torch import Tensor

from diffenc.shapes.scenes import COLORS, SHAPES, SIZES, Scene

GRID = 8
"""Patches along a side of a picture of 64 pixels."""


def truths(scenes: list[Scene], grid: int = GRID) -> Tensor:
    """`on_patches` of several scenes (b patches 3)."""
    return torch.stack([on_patches(scene, grid) for scene in scenes])


def on_patches(scene: Scene, grid: int = GRID) -> Tensor:
    """Indices of shape, colour and size on each patch, 0 where its centre is on no object."""
    found = torch.zeros(grid, grid, 3, dtype=torch.long)
    centers = (torch.arange(grid) + 0.5) / grid
    for thing in scene.objects:
        distance = (centers[:, None] - thing.y).square() + (centers[None] - thing.x).square()
        words = (
            SHAPES.index(thing.shape),
            COLORS.index(thing.color),
            SIZES.index(thing.size),
        )
        found[distance < thing.radius**2] = 1 + torch.tensor(words)
    return found.flatten(0, 1)
