"""Small files of phrases in each layout, and the pictures that they name."""

import json
import pickle
from pathlib import Path
from typing import Any

from PIL import Image

TABLES: dict[str, list[dict[str, Any]]] = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
        {"id": 8, "file_name": "b.jpg", "width": 40, "height": 30},
        {"id": 9, "file_name": "b.jpg", "width": 40, "height": 30},
    ],
    "categories": [{"id": 1, "name": "dog"}, {"id": 10, "name": "traffic light"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0},
        {
            "id": 2,
            "image_id": 7,
            "category_id": 10,
            "bbox": [5, 6, 7, 8],
            "segmentation": [[5, 6, 12, 6, 12, 14]],
        },
        {
            "id": 3,
            "image_id": 7,
            "category_id": 1,
            "bbox": [0, 0, 2, 2],
            "segmentation": {"size": [30, 40], "counts": [1, 2, 1197]},
            "iscrowd": 1,
        },
        {"id": 4, "image_id": 8, "category_id": 1, "bbox": [0, 0, 0, 5]},
        {"id": 5, "image_id": 8, "category_id": 10, "bbox": [0, 0, 4, 5]},
    ],
}
"""Instances of COCO: two dogs, one of them a crowd, and lights; one box has no extent."""

REFS: list[dict[str, Any]] = [
    {
        "ref_id": 4,
        "ann_id": 1,
        "image_id": 7,
        "split": "train",
        "file_name": "COCO_x_7_1.jpg",
        "sentences": [{"sent": "left dog", "tokens": ["left", "dog"]}, {"sent": "dog on the mat"}],
    },
    {"ref_id": 5, "ann_id": 2, "split": "val", "sentences": [{"sent": "the light"}]},
]
"""Expressions of RefCOCO for two of the instances."""

REGIONS: list[dict[str, Any]] = [
    {
        "id": 1,
        "regions": [
            {"phrase": "a man wearing a hat", "x": 1, "y": 2, "width": 3, "height": 4},
            {"phrase": "trees along the road ", "x": -1, "y": 0, "width": 9, "height": 9},
            {"phrase": "nothing", "x": 1, "y": 1, "width": 0, "height": 4},
            {"phrase": "...", "x": 1, "y": 1, "width": 2, "height": 4},
        ],
    },
    {"id": 2, "regions": []},
    {"image_id": 3, "regions": [{"phrase": "sky", "x": 0, "y": 0, "width": 4, "height": 4}]},
]
"""Regions of Visual Genome."""

LINE: dict[str, Any] = {
    "image": "a.jpg",
    "text": "is the red car left of a tree or a car?",
    "phrases": [
        {"words": "car", "boxes": [[1, 2, 3, 4]]},
        {"span": [25, 29], "segmentations": [[[5, 5, 9, 5, 9, 12]]]},
        {"words": "the red car", "boxes": [[1, 2, 3, 4], [0, 0, 9, 9]]},
    ],
}
"""A line of our own layout."""


def pictures(folder: Path, *names: str, size: tuple[int, int] = (40, 30)) -> Path:
    """Write grey pictures."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "gray").save(path)
    return folder


def write(path: Path, value: Any) -> Path:
    """Write a text, bytes, or a value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(value, bytes):
        value = (value if isinstance(value, str) else json.dumps(value)).encode()
    path.write_bytes(value)
    return path


def every_layout(folder: Path) -> tuple[Path, dict[str, Path]]:
    """A folder of pictures, and a file of each layout."""
    images = pictures(folder / "images", "a.jpg", "b.jpg", "VG_100K/1.jpg", "VG_100K_2/3.jpg")
    write(folder / "refcoco" / "instances.json", TABLES)
    contents = {
        "instances.json": TABLES,
        "regions.json": REGIONS,
        "refcoco/refs(unc).p": pickle.dumps(REFS, protocol=2),
        "refcoco/refs(x).json": REFS,
        "phrases.jsonl": f"{json.dumps(LINE)}\n" * 2,
    }
    return images, {name: write(folder / name, value) for name, value in contents.items()}
