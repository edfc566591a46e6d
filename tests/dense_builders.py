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
    camera = {"focal_length": 800.0, "q": [1.0, 0.0, 0.0, 0.0], "t": [0.0, 0.0, 500.0]}
    entry = {"filename": "000.jpg", "image_size": [400, 600], "camera": camera}
    (folder / "annotations.json").write_text(json.dumps([entry]))
    return root


BALL = 0.1  # metres


def write_navi_ball(root, turns, side=160):
    """Pictures of a ball whose colours are directions from its middle, by turns about y in degrees.

    The camera is 0.6 m away and, in pixels, twice as long as the shorter side of its picture.
    """
    folder = root / "ball" / "wild_set"
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True)
    width, focal = side + 40, 2.0 * side
    y, x = np.mgrid[0:side, 0:width]
    rays = np.stack([(x + 0.5 - width / 2) / focal, (y + 0.5 - side / 2) / focal, np.ones(x.shape)])
    middle = np.array([0.01, -0.02, 0.6])
    a, b = (rays**2).sum(0), np.einsum("c,chw->hw", middle, rays)
    inside = b**2 - a * (middle @ middle - BALL**2)
    depth = np.where(inside > 0, (b - np.sqrt(np.maximum(inside, 0))) / a, np.inf)
    away = np.where(inside > 0, rays * np.where(inside > 0, depth, 0) - middle[:, None, None], 0)
    entries = []
    for number, turn in enumerate(turns):
        c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
        own = np.einsum("dc,dhw->chw", [[c, 0, s], [0, 1, 0], [-s, 0, c]], away / BALL)
        colours = np.round(127.5 * (own + 1)).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(colours).save(
            folder / f"images/{number:03d}.jpg", quality=100, subsampling=0
        )
        disparity = np.round(65535 * 10 / (1000 * depth)).astype(np.uint16)
        Image.fromarray(disparity).save(folder / f"depth/{number:03d}.png")
        half = np.radians(turn) / 2
        camera = {
            "focal_length": 10 * focal,
            "q": [3 * np.cos(half), 0.0, 3 * np.sin(half), 0.0],  # of any length
            "t": list(1000 * middle),
        }
        size = [10 * side, 10 * width]
        entries.append({"filename": f"{number:03d}.jpg", "image_size": size, "camera": camera})
    (folder / "annotations.json").write_text(json.dumps(entries))
    return root
