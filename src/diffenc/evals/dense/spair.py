"""SPair-71k: pairs of pictures of one kind of thing with the same points marked in both.

Source:
    Min et al. 2019 (SPair-71k), arXiv:1908.10543, and its released files.
"""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffenc.config import check_choice
from diffenc.errors import ConfigError
from diffenc.evals.dense.data import PointPair, some_of
from diffenc.shapes.captions import with_article
from diffenc.storage.names import expanded, inside, is_file, is_folder, printable
from diffenc.storage.reading import read_json, read_text, text_lines

CATEGORIES = {"pottedplant": "potted plant", "tvmonitor": "tv monitor"}
"""Categories whose name is written in two words in a text."""

FOLDERS = ("JPEGImages", "PairAnnotation", "Layout")
SPLITS = ("trn", "val", "test")


def load_spair(
    folder: "str | os.PathLike[str]",
    *,
    split: Literal["trn", "val", "test"] = "test",
    layout: Literal["large", "small"] = "large",
    most: int | None = None,
) -> list[PointPair]:
    """Read the pairs of a split; pictures stay in their files.

    Args:
        folder: Unpacked folder with `ImageAnnotation`, `JPEGImages`, `Layout` and `PairAnnotation`.
        split: Name of the split.
        layout: List of pairs that counts: "large" is the published one, "small" a tenth of it.
        most: Largest number of pairs, spread evenly over the list; None reads all.

    Raises:
        ConfigError: The folder is none of SPair-71k, or a file is missing or broken.
    """
    check_choice("split", split, SPLITS)
    check_choice("layout", layout, ("large", "small"))
    root = expanded(folder)
    if missing := [name for name in FOLDERS if not is_folder(root / name)]:
        raise ConfigError(
            f"{printable(root)} is no folder of SPair-71k: it has no {' and no '.join(missing)}; "
            f"unpack SPair-71k.tar.gz and name the folder that holds {', '.join(FOLDERS)}"
        )
    listing = root / "Layout" / layout / f"{split}.txt"
    names = [line.strip() for line in text_lines(read_text(listing)) if line.strip()]
    if not names:
        raise ConfigError(f"{listing} names no pair")
    return [_pair(root, split, name) for name in some_of(names, most)]


def _pair(root: Path, split: str, name: str) -> PointPair:
    folder = root / "PairAnnotation" / split
    inside(folder, name.replace(":", "-"))  # names end in ":cat", which a path may have here
    path = folder / f"{name}.json"
    values = read_json(path)
    try:
        category = str(values["category"])
        files = tuple(f"{category}/{values[key]}" for key in ("src_imname", "trg_imname"))
        sizes = [tuple(map(int, values[key][:2])) for key in ("src_imsize", "trg_imsize")]
        left, top, right, bottom = map(float, values["trg_bndbox"])
        points = [
            _shares(values[key], size)
            for key, size in zip(("src_kps", "trg_kps"), sizes, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no annotation of a pair: {error!r}") from error
    if len(points[0]) != len(points[1]):
        raise ConfigError(
            f"{path} has {len(points[0])} points in the first picture and {len(points[1])} in the "
            "second"
        )
    images = [inside(root / "JPEGImages", file) for file in files]
    for image in images:
        if not is_file(image):
            raise ConfigError(f"{path} names a picture that is missing: {image}")
    caption = f"a photo of {with_article(CATEGORIES.get(category, category))}"
    return PointPair(
        names=(files[0], files[1]),
        images=(images[0], images[1]),
        captions=(caption, caption),
        first_points=points[0],
        second_points=points[1],
        second_size=(sizes[1][1], sizes[1][0]),
        box=max(right - left, bottom - top),
        category=category,
    )


def _shares(points: Any, size: tuple[int, ...]) -> Tensor:
    """Middles of pixels as shares of width and height; files have (width, height)."""
    pixels = torch.tensor(points, dtype=torch.float32, device="cpu").reshape(-1, 2)
    return (pixels + 0.5) / torch.tensor(size, dtype=torch.float32, device="cpu")
