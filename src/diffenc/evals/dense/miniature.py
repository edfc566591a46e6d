"""Dense tasks of the miniature world: points, shapes of cells, and what lies in front."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from diffenc.evals.dense.data import LabelledPicture, PointPair
from diffenc.shapes.captions import join, noun_phrase
from diffenc.shapes.render import masks, render
from diffenc.shapes.scenes import COLORS, SHAPES, Scene, sample_scene

HELD_OUT = 950_000
"""Seed of scenes to test on; no bundled model was trained on seeds from 900,000 up."""

_OFFSETS = ((0.0, 0.0), (-0.3, 0.3), (0.3, 0.3), (0.0, -0.4), (0.0, 0.35))  # inside every shape


def caption_of(scene: Scene) -> str:
    """All objects by colour and shape, in alphabetical order, which tells no depth and no place."""
    return join(sorted(noun_phrase(shape=each.shape, color=each.color) for each in scene.objects))


def scene_pair(index: int, *, recolored: bool, seed: int = HELD_OUT) -> tuple[Scene, Scene]:
    """Two scenes of the same three shapes, in other places and sizes.

    Args:
        index: Number of the pair, 0 or more; it decides the pair together with the seed.
        recolored: Whether the shapes have other colours in the second scene.
        seed: Seed of the pairs.
    """
    rng = random.Random(f"{seed}/{index}")
    kinds = list(zip(rng.sample(COLORS, 3), rng.sample(SHAPES, 3), strict=True))
    first, second = (sample_scene(rng, kinds=kinds) for _ in range(2))
    second = replace(second, background=first.background)
    if recolored:
        others = rng.sample([c for c in COLORS if c not in {color for color, _ in kinds}], 3)
        objects = tuple(
            replace(thing, color=color) for thing, color in zip(second.objects, others, strict=True)
        )
        second = replace(second, objects=objects)
    return first, second


def points_of(scene: Scene) -> Float[Tensor, "points 2"]:
    """Five points of each object, equal in its own coordinates: x and y as shares of the side."""
    points = [
        (thing.x + u * thing.radius, thing.y + v * thing.radius)
        for thing in scene.objects
        for u, v in _OFFSETS
    ]
    return torch.tensor(points, dtype=torch.float32, device="cpu")


def point_pairs(count: int, side: int, *, recolored: bool = True) -> list[PointPair]:
    """Pairs of pictures with points; the box of a pair is the whole picture.

    Args:
        count: Number of pairs.
        side: Side of the pictures in pixels.
        recolored: Whether the shapes have other colours in the second picture.
    """
    pairs = []
    for index in range(count):
        scenes = scene_pair(index, recolored=recolored)
        images, points = [render(each, side) for each in scenes], [*map(points_of, scenes)]
        pairs.append(
            PointPair(
                names=(f"{index}/first", f"{index}/second"),
                images=(images[0], images[1]),
                captions=(caption_of(scenes[0]), caption_of(scenes[1])),
                first_points=points[0],
                second_points=points[1],
                second_size=(side, side),
                box=side,
                category="shapes",
            )
        )
    return pairs


def shape_of_cells(scene: Scene, side: int, cells: int) -> Int[Tensor, "cells cells"]:
    """Class of each cell: 0 for background, or 1 and up for the shape of which most is seen in it.

    Args:
        scene: Scene whose truth is asked for.
        side: Side of the picture in pixels.
        cells: Number of cells on a side of the result.
    """
    areas = np.zeros((len(SHAPES), side, side), dtype=np.float32)
    for thing, mask in zip(scene.objects, masks(scene, side), strict=True):
        areas[SHAPES.index(thing.shape)] += mask
    return _largest(torch.from_numpy(areas), cells)


def order_of_cells(scene: Scene, side: int, cells: int) -> Int[Tensor, "cells cells"]:
    """Depth of each cell: 0 for background, 1 for the object drawn first, 2 for the one over it.

    Args:
        scene: Scene of two objects.
        side: Side of the picture in pixels.
        cells: Number of cells on a side of the result.
    """
    return _largest(torch.from_numpy(masks(scene, side)).float(), cells)


def _largest(areas: Float[Tensor, "parts side side"], cells: int) -> Int[Tensor, "cells cells"]:
    shares = F.adaptive_avg_pool2d(areas[None], cells)[0]
    return torch.cat([1 - shares.sum(0, keepdim=True), shares]).argmax(0)


def hidden_share(scene: Scene) -> float:
    """Share of the first object's pixels that lie under the second."""
    whole = masks(Scene(scene.objects[:1]), 64)[0]
    return 1 - float(masks(scene, 64)[0].sum() / whole.sum())


def overlapping_scenes(count: int, *, seed: int = HELD_OUT) -> list[Scene]:
    """Scenes of two objects of different colours, of which the second hides a part of the first.

    Args:
        count: Number of scenes.
        seed: Seed of the scenes.
    """
    kept: list[Scene] = []
    for index in range(100 * count):
        scene = sample_scene(random.Random(f"{seed}/{index}"), count=2, overlap=0.9)
        first, second = scene.objects
        if first.color != second.color and 0.1 < hidden_share(scene) < 0.6:
            kept.append(scene)
        if len(kept) == count:
            break
    return kept


def labelled(
    scenes: Sequence[Scene], labels: Sequence[Int[Tensor, "cells cells"]], side: int
) -> list[LabelledPicture]:
    """Pictures of scenes with their captions and the classes of their cells."""
    return [
        LabelledPicture(render(scene, side), caption_of(scene), each)
        for scene, each in zip(scenes, labels, strict=True)
    ]
