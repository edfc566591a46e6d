"""Sizes and cut-outs as torchvision counts them, written to torchvision_geometry.json.

pip install torchvision==0.28.0; python tests/golden/torchvision_geometry.py
"""

import json
import random
from pathlib import Path

import torchvision
from PIL import Image
from torchvision.transforms import CenterCrop, Resize, functional

NAMED = [(480, 640, 512), (427, 640, 512), (480, 640, 224), (427, 640, 224), (640, 427, 336)]


def row(height: int, width: int, side: int) -> list[int]:
    """Picture and side, then the resized picture and the corner of the cut-out."""
    corner = []
    crop = functional.crop
    functional.crop = lambda image, top, left, h, w: corner.extend((top, left)) or image
    try:
        resized = Resize(side)(Image.new("L", (width, height)))
        CenterCrop(side)(resized)
    finally:
        functional.crop = crop
    return [height, width, side, resized.height, resized.width, *corner]


def main() -> None:
    """Write the file."""
    draw = random.Random(0)
    sizes = [
        (draw.randint(1, 700), draw.randint(1, 700), draw.choice((64, 224, 336, 512)))
        for _ in range(400)
    ]
    rows = [row(*each) for each in NAMED + [s for s in sizes if max(s[:2]) < 12 * min(s[:2])]]
    content = {
        "made by": f"{Path(__file__).name}, torchvision {torchvision.__version__.split('+')[0]}",
        "columns": ["height", "width", "side", "resized height", "resized width", "top", "left"],
        "rows": rows,
    }
    lines = ",\n".join(f"  {json.dumps(each)}" for each in rows)
    text = json.dumps({**content, "rows": []}, indent=1).replace("[]", f"[\n{lines}\n ]")
    Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
