"""Small folders in the layouts of SPair-71k, NYU and NAVI."""

import json

import numpy as np
from PIL import Image

from diffenc.evals.dense.nyu import FOCAL

PAIR = {
    "filename": "000001-a-b:pottedplant",
    "src_imname": "a.jpg",
    "trg_imname": "b.jpg",
    "src_imsize": [40, 20, 3],
    "trg_imsize": [50, 100, 3],
    "trg_bndbox": [10, 20, 40, 60],
    "category": "pottedplant",
    "src_kps": [[0, 0], [39, 19]],
    "trg_kps": [[10, 20], [30, 60]],
    "kps_ids": ["0", "3"],
}


def write_spair(root, count=1, **changes):
    for folder in ("ImageAnnotation", "JPEGImages/pottedplant", "Layout/large"):
        (root / folder).mkdir(parents=True)
    (root / "PairAnnotation/test").mkdir(parents=True)
    Image.new("RGB", (40, 20), "red").save(root / "JPEGImages/pottedplant/a.jpg")
    Image.new("RGB", (50, 100), "blue").save(root / "JPEGImages/pottedplant/b.jpg")
    names = [f"{number:06d}-a-b:pottedplant" for number in range(count)]
    (root / "Layout/large/test.txt").write_text("\n".join(names) + "\n")
    for name in names:
        path = root / "PairAnnotation/test" / f"{name}.json"
        path.write_text(json.dumps({**PAIR, **changes}))
    return root


def slope():
    """Depth of a plane whose normal is known, as a camera in the middle sees it."""
    normal = np.array([0.3, -0.2, -1.0])
    normal /= np.linalg.norm(normal)
    y, x = np.mgrid[0:480, 0:640]
    rays = np.stack([(x + 0.5 - 320) / FOCAL, (y + 0.5 - 240) / FOCAL, np.ones_like(x)])
    return -2.0 / np.einsum("c,chw->hw", normal, rays), normal


def write_nyu(root, split="test", count=1):
    depth, _ = slope()
    room = root / split / "living_room_0012a"
    room.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (640, 480), "gray").save(room / f"rgb_{number:05d}.jpg")
        millimetres = np.round(depth * 1000).astype(np.uint16)
        Image.fromarray(millimetres).save(room / f"sync_depth_{number:05d}.png")
    Image.new("RGB", (640, 480)).save(room / "rgb_99999.jpg")  # without a depth map
    return root


def write_navi(root, place="wild_set"):
    folder = root / "toy_dog" / place
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (60, 40), "gray").save(folder / "images/000.jpg")
    millimetres = np.full((40, 60), np.inf)
    millimetres[10:20, 30:50] = 500.0
    millimetres[20:30, 30:50] = 1000.0
    disparity = np.round(65535 * 10 / millimetres).astype(np.uint16)
    Image.fromarray(disparity).save(folder / "depth/000.png")
    entry = {"filename": "000.jpg", "image_size": [400, 600], "camera": {"focal_length": 800.0}}
    (folder / "annotations.json").write_text(json.dumps([entry]))
    return root
