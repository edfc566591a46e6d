"""NAVI: objects from all sides, with depth maps that follow from scans and known cameras.

Source:
    Jampani et al. 2023 (NAVI), arXiv:2306.09109. Splits, the crop around the object and depth
    relative to it are those of Probe3D (El Banani et al. 2024, arXiv:2404.08636).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from diffenc.config import check_choice
from diffenc.errors import ConfigError
from diffenc.evals.dense.data import DepthPicture, Surface, some_of
from diffenc.evals.dense.surfaces import normals_of
from diffenc.inputs.images import load_image
from diffenc.inputs.pictures.files import load_numbers
from diffenc.storage.names import expanded, is_file, is_folder, printable
from diffenc.storage.reading import read_json

_DISPARITY = 10 * (2**16 - 1)  # units of the depth maps per reciprocal millimetre
_SMALLER = "downsampled_"  # files that Probe3D's script writes beside the originals


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
        there = torch.from_numpy(disparity > 0)
        metres = _DISPARITY / np.maximum(disparity, 1) / 1000
        depth = torch.from_numpy(metres.astype("float32")) * there
        normals = normals_of(depth, self.focal * min(depth.shape))
        depth, there = depth[rows, columns], there[rows, columns]
        nearest, farthest = depth[there].min(), depth.max()
        share = (depth - nearest) / (farthest - nearest).clamp_min(0.01)
        return Surface((0.01 + 0.99 * share) * there, normals[:, rows, columns])


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
    root = expanded(folder)
    if not is_folder(root):
        raise ConfigError(f"there is no folder {printable(root)}")
    places = sorted(root.glob("*/multiview_*" if split == "train" else "*/wild_set"))
    pictures = [picture for place in places for picture in _pictures_of(place)]
    if not pictures:
        raise ConfigError(
            f"{root} holds no pictures of NAVI: expected <object>/wild_set and "
            "<object>/multiview_<...>, each with images/, depth/ and annotations.json"
        )
    return some_of(pictures, most)


def _pictures_of(place: Path) -> list[NaviPicture]:
    path = place / "annotations.json"
    pictures = []
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
                pictures.append(NaviPicture(picture, depth, focal, _caption(place.parent.name)))
                break
    return pictures


def _caption(name: str) -> str:
    return f"a photo of {name.replace('_', ' ')}"


def _box(disparity: "np.ndarray[Any, Any]", path: Path) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of a square around the object, cut at the picture's border."""
    rows, columns = np.nonzero(disparity)
    if not len(rows):
        raise ConfigError(f"{path} shows no object: all of its depth is unknown")
    top, bottom = int(rows.min()), int(rows.max()) + 1
    left, right = int(columns.min()), int(columns.max()) + 1
    side = max(bottom - top, right - left)
    height, width = disparity.shape
    top = max(0, min((top + bottom - side) // 2, height - side))
    left = max(0, min((left + right - side) // 2, width - side))
    return top, left, min(top + side, height), min(left + side, width)
