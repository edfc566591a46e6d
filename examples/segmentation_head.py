# %% [markdown]
# # A segmentation head
#
# The U-Net's features come at several scales from one pass. `extract(...).to_list()` gives them
# from fine to coarse, as segmentation heads of other libraries take them. Here a small head of
# convolutions learns which shape each pixel belongs to. It is trained four times: on pixels, on the
# VAE's latents, on features without a text, and on features under a text that names all four
# shapes. The first two are what the U-Net itself starts from: they show what the head can do alone.
#
# On your own data two things change: the images and the truth. On the command line:
# `python examples/segmentation_head.py --backbone sd2.1-base`.

# %%
import argparse
import sys
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from diffenc import DiffusionEncoder
from diffenc.evals.dense.miniature import shape_of_cells
from diffenc.inputs.images import to_pixel_values
from diffenc.inputs.latents import encode_latents
from diffenc.shapes import Scene, render, sample_scenes
from diffenc.shapes.render import GROUND
from diffenc.shapes.scenes import SHAPES
from diffenc.viz import Panel, figure

parser = argparse.ArgumentParser(description="A segmentation head on multi-scale features.")
parser.add_argument("--backbone", default="shapes", help="for photographs: sd2.1-base")
parser.add_argument("--scenes", type=int, default=240, help="to train on")
parser.add_argument("--steps", type=int, default=400, help="of training")
parser.add_argument("--output", "-o", default="segmentation-head.png", help="the picture")
options = parser.parse_args([] if hasattr(sys, "ps1") else None)  # a notebook has no options

encoder = DiffusionEncoder.from_pretrained(options.backbone)
SIDE = encoder.backbone.default_size
CELLS = 32  # side of the map of classes
CLASSES = ("background", *SHAPES)
TEXT = "a circle, a square, a triangle and a star"

# %% [markdown]
# Truth comes from the renderer: the mask of every object. Scenes for the test have seeds that no
# bundled model was trained on.

# %%
train_scenes = list(sample_scenes(options.scenes, seed=1))
test_scenes = list(sample_scenes(max(8, options.scenes // 3), seed=950_000))
train_truth = torch.stack([shape_of_cells(scene, SIDE, CELLS) for scene in train_scenes])
test_truth = torch.stack([shape_of_cells(scene, SIDE, CELLS) for scene in test_scenes])

# %% [markdown]
# What the head sees: a list of maps, one per scale. The text is the same for all pictures. It says
# what may be there, not what is there, so it gives nothing away; a caption of each picture would
# raise the numbers and mean less.


# %%
def pixels(images: list[Image.Image]) -> list[Tensor]:
    return [to_pixel_values(images, size=SIDE)]


def latents(images: list[Image.Image]) -> list[Tensor]:
    with torch.no_grad():
        return [encode_latents(encoder.backbone.vae, pixels(images)[0])]


def features(images: list[Image.Image]) -> list[Tensor]:
    return encoder.extract(images).to_list()


def features_under_text(images: list[Image.Image]) -> list[Tensor]:
    return encoder.extract(images, TEXT).to_list()


def read(source: Callable[[list[Image.Image]], list[Tensor]], scenes: list[Scene]) -> list[Tensor]:
    images = [render(scene, SIDE) for scene in scenes]
    parts = [source(images[start : start + 20]) for start in range(0, len(images), 20)]
    return [torch.cat(maps).float() for maps in zip(*parts, strict=True)]


# %% [markdown]
# The head: each scale is normalised and projected, all are brought to one grid and added; two
# convolutions follow, which together look five cells far. It has the same size for all inputs, but
# for the projections.


# %%
class Head(nn.Module):
    def __init__(self, channels: list[int], width: int = 32) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False) for c in channels)
        self.projections = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.mix = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=4, dilation=4),
            nn.ReLU(),
            nn.Conv2d(width, len(CLASSES), 1),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Scores of the classes, (b, classes, CELLS, CELLS)."""
        projected = [
            F.interpolate(project(norm(m)), CELLS, mode="bilinear", antialias=True)
            for m, norm, project in zip(maps, self.norms, self.projections, strict=True)
        ]
        scores: Tensor = self.mix(torch.stack(projected).sum(0).relu())
        return scores


def train(maps: list[Tensor], truth: Tensor) -> Head:
    torch.manual_seed(0)
    head = Head([m.shape[1] for m in maps])
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=options.steps)
    for _ in range(options.steps):
        rows = torch.randint(len(truth), (12,))
        optimizer.zero_grad()
        F.cross_entropy(head([m[rows] for m in maps]), truth[rows]).backward()
        optimizer.step()
        schedule.step()
    return head.eval()


# %% [markdown]
# Intersection over union per class on the scenes of the test. The last digits depend on the
# machine, whose rounding grows over the steps of a training. There is one seed: differences of a
# few hundredths between rows say nothing.


# %%
def iou(found: Tensor, truth: Tensor) -> list[float]:
    """Per shape."""
    return [
        float(((found == k) & (truth == k)).sum() / ((found == k) | (truth == k)).sum().clamp(1))
        for k in range(1, len(CLASSES))
    ]


SOURCES = {
    "pixels": pixels,
    "latents": latents,
    "features": features,
    "features + text": features_under_text,
}
found: dict[str, Tensor] = {}
means: dict[str, float] = {}
print(f"IoU of a small head on {len(test_scenes)} new scenes, {options.backbone}")
print(f"  {'input':16}{''.join(f'{name:>10}' for name in (*SHAPES, 'mean'))}")
for name, source in SOURCES.items():
    head = train(read(source, train_scenes), train_truth)
    with torch.no_grad():
        found[name] = head(read(source, test_scenes)).argmax(1)
    scores = iou(found[name], test_truth)
    means[name] = sum(scores) / len(scores)
    line = [*scores, means[name]]
    print(f"  {name:16}{''.join(f'{score:10.3f}' for score in line)}")

# %% [markdown]
# Some of the scenes: the picture, the truth, and what each head finds.

# %%
COLORS = np.array([GROUND["white"], (220, 90, 60), (60, 120, 220), (70, 170, 100), (240, 190, 50)])


def painted(classes: Tensor) -> Image.Image:
    return Image.fromarray(COLORS[classes.numpy()].astype(np.uint8))


rows = []
for index in [k for k, scene in enumerate(test_scenes) if len(scene.objects) > 1][:4]:
    panels = [Panel(render(test_scenes[index], SIDE), "picture")]
    panels.append(Panel(painted(test_truth[index]), "truth"))
    panels += [Panel(painted(maps[index]), f"from {name}") for name, maps in found.items()]
    rows.append(panels)
drawn = figure(
    rows,
    title="Which shape is where, from pixels, from latents and from features",
    note=f"Model: {options.backbone}. Text: {TEXT}. Red: circle, blue: square, green: triangle, "
    "yellow: star.",
    side=160,
)
drawn.save(options.output)
print(f"wrote {options.output}")

# %%
drawn

# %% [markdown]
# The encoder is frozen, so features of all images can be computed once, as here, or written to a
# file by `diffenc encode`. What do they add to what the U-Net starts from?

# %%
print(f"mean IoU: features {means['features']:.2f}, latents {means['latents']:.2f}")
