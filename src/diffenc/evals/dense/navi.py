"""NAVI: objects from all sides, with depth maps that follow from scans and known cameras.

Source:
    Jampani et al. 2023 (NAVI), arXiv:2306.09109. Splits, the crop around the object, depth
    relative to it and the way in which views are paired are those of Probe3D (El Banani et al.
    2024, arXiv:2404.08636).
"""

import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffenc.config import check_choice
from diffenc.errors import ConfigError
from diffenc.evals.dense.data import DepthPicture, Sighting, Surface, View, some_of
from diffenc.evals.dense.surfaces import normals_of
from diffenc.evals.dense.views import rotation_angle
from diffenc.inputs.images import load_image
from diffenc.inputs.pictures.files import load_numbers
from diffenc.storage.names import expanded, is_file, is_folder, printable
from diffenc.storage.reading import read_json

_DISPARITY = 10 * (2**16 - 1)  # units of the depth maps per reciprocal millimetre
_SMALLER = "downsampled_"  # files that Probe3D's script writes beside the originals
_WIDEST = 120  # degrees between the views of a pair, at most
_EVERY = 4  # every fourth picture begins a pair


@dataclass(frozen=True, slots=True, eq=False)
class NaviPicture(DepthPicture):
    """A picture of an object.

    Attributes:
        picture: File of the picture.
        depth: File of the depth map.
        focal: Focal length over the shorter side of the picture.
        caption: Text about the picture.
    """

    picture: Path
    depth: Path
    focal: float
    caption: str

    def image(self) -> Image.Image:
        """The square around the object, or what of it lies in the picture."""
        top, left, bottom, right = _box(load_numbers(self.depth), self.depth)
        return load_image(self.picture).crop((left, top, right, bottom))

    def surface(self) -> Surface:
        """Depth within the object, 0.01 at its nearest point to 1 at its farthest, and normals.

        Raises:
            ImageError: The depth map cannot be read.
            ConfigError: It shows no object.
        """
        disparity = load_numbers(self.depth)
        top, left, bottom, right = _box(disparity, self.depth)
        rows, columns = slice(top, bottom), slice(left, right)
        depth = _metres(disparity)
        there = depth > 0
        normals = normals_of(depth, self.focal * min(depth.shape))
        depth, there = depth[rows, columns], there[rows, columns]
        nearest, farthest = depth[there].min(), depth.max()
        share = (depth - nearest) / (farthest - nearest).clamp_min(0.01)
        return Surface((0.01 + 0.99 * share) * there, normals[:, rows, columns])


@dataclass(frozen=True, slots=True, eq=False)
class NaviView(View):
    """A picture of an object and its camera.

    Attributes:
        name: Object, set of pictures and picture.
        caption: Text about the picture.
        seen: Picture, its depth map and focal length.
        rotation: Rotation from the object's directions to the camera's.
        translation: Place of the object's origin, in metres from the camera.
    """

    name: str
    caption: str
    seen: NaviPicture
    rotation: Float[Tensor, "3 3"]
    translation: Float[Tensor, "3"]

    def image(self) -> Image.Image:
        """The square around the object."""
        return self.seen.image()

    def sighting(self, cells: int) -> Sighting:
        """Points on the object, at the middles of the cells of a grid over the square around it.

        Raises:
            ImageError: The depth map cannot be read.
            ConfigError: It shows no object.
        """
        disparity = load_numbers(self.seen.depth)
        top, left, bottom, _ = _box(disparity, self.seen.depth)
        side = bottom - top
        focal = self.seen.focal * min(disparity.shape)  # in pixels
        steps = (
            (torch.arange(cells, dtype=torch.float64, device="cpu") + 0.5) * side / cells
        ).long()
        y, x = top + steps, left + steps
        depth = _metres(disparity)[y][:, x]
        right = ((x + 0.5 - disparity.shape[1] / 2) / focal).float()
        down = ((y + 0.5 - disparity.shape[0] / 2) / focal).float()
        points = torch.stack([right[None, :] * depth, down[:, None] * depth, depth])
        return Sighting(points, self.rotation, self.translation, focal / side)


def load_navi(
    folder: "str | os.PathLike[str]",
    *,
    split: Literal["train", "test"] = "test",
    most: int | None = None,
) -> list[NaviPicture]:
    """Find the pictures of a split: those of several views to train on, those in the wild to test.

    Args:
        folder: Unpacked folder with `<object>/multiview_<...>` and `<object>/wild_set`, each with
            `images`, `depth` and `annotations.json`.
        split: Name of the split.
        most: Largest number of pictures, spread evenly over all; None reads all.

    Raises:
        ConfigError: There is no such folder, no picture with a depth map in it, or a broken file.
    """
    check_choice("split", split, ("train", "test"))
    root = _checked_root(folder)
    places = sorted(root.glob("*/multiview_*" if split == "train" else "*/wild_set"))
    pictures = [picture for place in places for picture in _pictures_of(place)]
    if not pictures:
        raise ConfigError(
            f"{root} holds no pictures of NAVI: expected <object>/wild_set and "
            "<object>/multiview_<...>, each with images/, depth/ and annotations.json"
        )
    return some_of(pictures, most)


def load_navi_pairs(
    folder: "str | os.PathLike[str]", *, most: int | None = None, seed: int = 8
) -> list[tuple[NaviView, NaviView]]:
    """Pair pictures in the wild: every fourth with another of its object, by chance.

    Both views lie between 0 and 120 degrees apart. A picture without such a partner is left out.

    Args:
        folder: Unpacked folder with `<object>/wild_set`, which has `images`, `depth` and
            `annotations.json` with `q` and `t` of each camera.
        most: Largest number of pairs, spread evenly over all; None reads all.
        seed: Seed of the choice.

    Raises:
        ConfigError: There is no such folder, no pair of pictures in it, or a broken file.
    """
    root = _checked_root(folder)
    views = [_views_of(place) for place in sorted(root.glob("*/wild_set"))]
    partners = [_partner(view, each, seed) for each in views for view in each]
    firsts = [view for each in views for view in each]
    pairs = [(a, b) for a, b in zip(firsts, partners, strict=True) if b is not None]
    if not pairs:
        raise ConfigError(
            f"{root} holds no pairs of NAVI: expected <object>/wild_set with two or more pictures "
            f"within {_WIDEST} degrees, in images/, depth/ and annotations.json"
        )
    return some_of(pairs[::_EVERY], most)


def _partner(view: NaviView, views: Sequence[NaviView], seed: int) -> NaviView | None:
    """A view from another side than this one, though not from behind; by chance."""
    near = [
        other
        for other in views
        if other is not view and 0 < rotation_angle(other.rotation @ view.rotation.T) <= _WIDEST
    ]
    return random.Random(f"{seed}/{view.name}").choice(near) if near else None


def _checked_root(folder: "str | os.PathLike[str]") -> Path:
    root = expanded(folder)
    if not is_folder(root):
        raise ConfigError(f"there is no folder {printable(root)}")
    return root


def _pictures_of(place: Path) -> list[NaviPicture]:
    return [picture for _, picture in _annotated(place)]


def _views_of(place: Path) -> list[NaviView]:
    views = []
    for entry, picture in _annotated(place):
        try:
            rotation = _rotation([float(each) for each in entry["camera"]["q"]])
            t = [float(each) / 1000 for each in entry["camera"]["t"]]
            translation = torch.tensor(t, dtype=torch.float32, device="cpu").reshape(3)
        except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{place / 'annotations.json'} has a camera that is none of NAVI's: {error!r}"
            ) from error
        name = f"{place.parent.name}/{place.name}/{picture.picture.name}"
        views.append(NaviView(name, picture.caption, picture, rotation, translation))
    return views


def _rotation(quaternion: Sequence[float]) -> Tensor:
    """Rotation matrix of a quaternion (w, x, y, z) of any length but 0."""
    w, x, y, z = (float(part) / math.hypot(*quaternion) for part in quaternion)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


def _annotated(place: Path) -> Iterator[tuple[dict[str, Any], NaviPicture]]:
    """Annotations of the pictures that are there with a depth map."""
    path = place / "annotations.json"
    for entry in read_json(path, list):
        try:
            stem = Path(entry["filename"]).stem
            focal = float(entry["camera"]["focal_length"]) / min(map(int, entry["image_size"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is no list of NAVI's annotations: {error!r}") from error
        for prefix in (_SMALLER, ""):
            picture = place / "images" / f"{prefix}{stem}.jpg"
            depth = place / "depth" / f"{prefix}{stem}.png"
            if is_file(picture) and is_file(depth):
                yield entry, NaviPicture(picture, depth, focal, _caption(place.parent.name))
                break


def _caption(name: str) -> str:
    return f"a photo of {name.replace('_', ' ')}"


def _metres(disparity: "np.ndarray[Any, Any]") -> Float[Tensor, "height width"]:
    """Distance along the camera's axis; 0 where it is unknown."""
    metres = _DISPARITY / np.maximum(disparity, 1) / 1000
    return torch.from_numpy((metres * (disparity > 0)).astype("float32"))


def _box(disparity: "np.ndarray[Any, Any]", path: Path) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of a square around the object in the picture's middle square."""
    height, width = disparity.shape
    most = min(height, width)
    above, before = (height - most) // 2, (width - most) // 2
    rows, columns = np.nonzero(disparity[above : above + most, before : before + most])
    if not len(rows):
        raise ConfigError(f"{path} shows no object: all depth in its middle square is unknown")
    top, bottom = int(rows.min()), int(rows.max()) + 1
    left, right = int(columns.min()), int(columns.max()) + 1
    side = max(bottom - top, right - left)
    top = above + max(0, min((top + bottom - side) // 2, most - side))
    left = before + max(0, min((left + right - side) // 2, most - side))
    return top, left, top + side, left + side
