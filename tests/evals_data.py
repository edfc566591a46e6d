"""Tiny datasets on disk in the layouts of the real ones, and matchers whose scores are known."""

import csv
import hashlib
import io
import json
from pathlib import Path

import torch
from PIL import Image

from diffenc.evals.matching.mmvp_vlm import PATTERNS

CAPTIONS = [
    ('some plants, "quoted", near a cup', "a cup near some plants"),
    ("old hugs young", "young hugs old"),
    ("the dog chases a café", "a café chases the dog"),
]


def color(index, k):
    return (40 * index + 10, 200 * k + 20, 90)


def picture(index, k, *, size=(24, 16)):
    """Plain, so that its colour survives every format."""
    return Image.new("RGB", size, color(index, k))


def encoded(image, suffix):
    buffer = io.BytesIO()
    image.save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix])
    return buffer.getvalue()


def winoground_rows(image):
    """Rows with `image(index, k)` in the columns of pictures."""
    return [
        {
            "id": index,
            "image_0": image(index, 0),
            "image_1": image(index, 1),
            "caption_0": captions[0],
            "caption_1": captions[1],
            "tag": "Adjective",
            "secondary_tag": "" if index else "Series",
            "num_main_preds": 1 + index % 2,
            "collapsed_tag": ("Object", "Relation", "Both")[index],
        }
        for index, captions in enumerate(CAPTIONS)
    ]


def write_pictures(folder, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(len(CAPTIONS)):
        for k in range(2):
            path = folder / f"ex_{index}_img_{k}.{suffix}"
            path.write_bytes(encoded(picture(index, k), suffix))


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path, rows, *, bom=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def change_questions(folder, edit):
    """Rewrite `Questions.csv`; `edit` gets the rows with their header."""
    path = folder / "Questions.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = edit(list(csv.reader(file)))
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def winoground_jsonl(folder, *, name="examples.jsonl", suffix="png"):
    write_jsonl(folder / name, winoground_rows(lambda index, k: f"ex_{index}_img_{k}"))
    write_pictures(folder / "images", suffix)
    return folder


def mmvp_vlm(folder, *, images="MLLM_VLM Images", rename=str, pairs_per_type=1):
    """One pair per type, in the benchmark's order; `rename` makes folders of types."""
    rows, number = [], 1
    for kind in PATTERNS:
        for _ in range(pairs_per_type):
            for k in range(2):
                statement = f'{kind.lower()}, "number" {number}'
                rows.append({"Question ID": number, "Type": kind, "Statement": statement})
                path = folder / images / rename(kind) / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(picture(number % 5, k), "jpg"))
                number += 1
    write_csv(folder / "Questions.csv", rows)
    return folder


class RandomMatcher:
    """Independent normal scores from seed, texts and pixels."""

    def __init__(self, name="random", *, deterministic=False, limit=10**6, **description):
        self.name, self.deterministic, self.limit = name, deterministic, limit
        self.description = {"kind": "random", **description}
        self.calls = 0

    def __call__(self, images, texts, *, seed):
        self.calls += 1
        pixels = b"".join(image.tobytes() for image in images)
        content = pixels + f"{self.name} {seed} {texts}".encode()
        digest = hashlib.sha256(content).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(2, 2, generator=generator)

    def truncated(self, texts):
        return [max(0, len(text.split()) - self.limit) for text in texts]


class ColorMatcher(RandomMatcher):
    """Right about everything that `winoground_rows` and `mmvp_vlm` write."""

    def __call__(self, images, texts, *, seed):
        self.calls += 1
        second = torch.tensor([image.getpixel((0, 0))[1] > 100 for image in images])
        return (second[:, None] == torch.tensor([False, True])[None]).float()


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
