"""NYU Depth v2 in the folders of its official split: pictures of rooms with their depth.

Source:
    Silberman et al. 2012, Indoor segmentation and support inference from RGBD images; the folders
    are those that BTS (Lee et al. 2019, arXiv:1907.10326) made of it. The crop is Eigen's.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from diffenc.config import check_choice
from diffenc.errors import ConfigError
from diffenc.evals.dense.data import DepthPicture, Surface, some_of
from diffenc.evals.dense.surfaces import normals_of
from diffenc.inputs.images import load_image
from diffenc.inputs.pictures.files import load_numbers
from diffenc.shapes.captions import with_article
from diffenc.storage.names import expanded, is_file, is_folder, printable

FOCAL = 518.86
"""Focal length of the camera in pixels, at 480 x 640."""

FARTHEST = 10.0
"""Largest depth that counts, in metres."""

CROP = (slice(45, 471), slice(41, 601))
"""Rows and columns that are measured on, at 480 x 640."""

_SIZE = (480, 640)


@dataclass(frozen=True, slots=True, eq=False)
class NyuPicture(DepthPicture):
    """A picture of a room.

    Attributes:
        picture: File of the picture.
        depth: File of the depth map, in millimetres.
        caption: Text about the picture, of the kind of room.
    """

    picture: Path
    depth: Path
    caption: str

    def image(self) -> Image.Image:
        """The picture, decoded."""
        return load_image(self.picture)

    def surface(self) -> Surface:
        """Depth in metres within the crop, and the normals that follow from it.

        Raises:
            ImageError: The depth map cannot be read.
            ConfigError: It is not 480 x 640.
        """
        millimetres = load_numbers(self.depth)
        if millimetres.shape != _SIZE:
            raise ConfigError(
                f"{self.depth} must be {_SIZE[0]} x {_SIZE[1]} pixels, as the official split is, "
                f"got {' x '.join(map(str, millimetres.shape))}"
            )
        whole = torch.from_numpy(millimetres.astype("float32")) / 1000
        whole = whole.masked_fill(whole > FARTHEST, 0)
        depth = torch.zeros_like(whole)
        depth[CROP] = whole[CROP]
        return Surface(depth, normals_of(whole, FOCAL) * (depth > 0))


def load_nyu(
    folder: "str | os.PathLike[str]",
    *,
    split: Literal["train", "test"] = "test",
    most: int | None = None,
) -> list[NyuPicture]:
    """Find the pictures of a split: `<room>/rgb_<number>.jpg` with `sync_depth_<number>.png`.

    Args:
        folder: Folder with `train` and `test`.
        split: Name of the split.
        most: Largest number of pictures, spread evenly over all; None reads all.

    Raises:
        ConfigError: There is no such folder, or no picture with a depth map in it.
    """
    check_choice("split", split, ("train", "test"))
    root = expanded(folder) / split
    if not is_folder(root):
        raise ConfigError(
            f"there is no folder {printable(root)}; name the one that holds train and test with "
            "<room>/rgb_00045.jpg and <room>/sync_depth_00045.png"
        )
    pictures = []
    for picture in sorted(root.glob("*/rgb_*.jpg")):
        number = picture.stem.removeprefix("rgb_")
        depth = picture.with_name(f"sync_depth_{number}.png")
        if is_file(depth):
            room = re.sub(r"_\d+\w*$", "", picture.parent.name).replace("_", " ")
            pictures.append(NyuPicture(picture, depth, f"a photo of {with_article(room)}"))
    if not pictures:
        raise ConfigError(
            f"{root} holds no <room>/rgb_<number>.jpg with a sync_depth_<number>.png beside it"
        )
    return some_of(pictures, most)
