# %% [markdown]
# # What lies in front
#
# Where two shapes overlap, a viewer knows which one is nearer: the one whose outline goes on. The
# bundled world is drawn object by object, so the truth is known. A linear layer on frozen features
# learns three steps of depth for every cell: background, behind, in front. The same layer is fitted
# to pixels and to the VAE's latents, which is what the U-Net starts from.
#
# On the command line: `python examples/depth.py --backbone sd2.1-base`.

# %%
import argparse
import sys

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from diffenc import DiffusionEncoder
from diffenc.denoiser.grids import to_grid
from diffenc.evals.dense.miniature import caption_of, order_of_cells, overlapping_scenes
from diffenc.inputs.images import to_pixel_values
from diffenc.inputs.latents import encode_latents
from diffenc.shapes import Scene, render
from diffenc.viz import HeatMap, Panel, figure

parser = argparse.ArgumentParser(description="Depth from the order in which shapes were drawn.")
parser.add_argument("--backbone", default="shapes", help="for photographs: sd2.1-base")
parser.add_argument("--scenes", type=int, default=300, help="to train on")
parser.add_argument("--steps", type=int, default=300, help="of training")
parser.add_argument("--output", "-o", default="depth.png", help="the picture")
options = parser.parse_args([] if hasattr(sys, "ps1") else None)  # a notebook has no options

encoder = DiffusionEncoder.from_pretrained(options.backbone)
SIDE = encoder.backbone.default_size
CELLS = 16

# %% [markdown]
# Scenes of two shapes, the second drawn over the first. Only those in which the second hides a part
# of the first are kept: in all others nobody could tell the order. Colours, sizes and kinds are
# drawn alike for both shapes, so a layer that sees colours alone stays at chance.

# %%
train_scenes = overlapping_scenes(options.scenes, seed=1)
test_scenes = overlapping_scenes(max(10, options.scenes // 3), seed=950_000)
train_depth = torch.stack([order_of_cells(scene, SIDE, CELLS) for scene in train_scenes])
test_depth = torch.stack([order_of_cells(scene, SIDE, CELLS) for scene in test_scenes])

# %% [markdown]
# Inputs, all on one grid. The caption names both shapes in alphabetical order: it does not tell
# which one is in front.


# %%
def inputs_of(scenes: list[Scene]) -> dict[str, Tensor]:
    """Per input (scenes, cells, channels)."""
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(scenes), 20):
        batch = scenes[start : start + 20]
        images = [render(scene, SIDE) for scene in batch]
        features = encoder.extract(images, [caption_of(s) for s in batch], conditioning="cfg")
        pixel_values = to_pixel_values(images, size=SIDE)
        with torch.no_grad():
            latents = encode_latents(encoder.backbone.vae, pixel_values)
        for name, maps in (("pixels", pixel_values), ("latents", latents)):
            tokens = rearrange(to_grid(maps, (CELLS, CELLS)), "b c h w -> b (h w) c")
            parts.setdefault(name, []).append(tokens)
        parts.setdefault("features", []).append(features.select("uncond").tokens(CELLS))
        parts.setdefault("features + caption", []).append(features.select("cond").tokens(CELLS))
    return {name: torch.cat(tokens).float() for name, tokens in parts.items()}


# %% [markdown]
# A linear layer per cell. Its depth of a cell is the expected step, 0 to 2. Two numbers: the share
# of the shapes' cells whose step is right, and the share of scenes in which the front shape is
# deemed nearer, mean over its visible cells; chance is one half for both.


# %%
def fit(tokens: Tensor, depth: Tensor) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Sequential(
        nn.BatchNorm1d(tokens.shape[-1], affine=False), nn.Linear(tokens.shape[-1], 3)
    )
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in range(options.steps):
        rows = torch.randint(len(depth), (24,))
        optimizer.zero_grad()
        F.cross_entropy(layer(tokens[rows].flatten(0, 1)), depth[rows].flatten()).backward()
        optimizer.step()
        schedule.step()
    return layer.eval()


def predict(layer: nn.Module, tokens: Tensor) -> Tensor:
    """Probabilities of the steps, (scenes, CELLS, CELLS, 3)."""
    with torch.no_grad():
        scores: Tensor = layer(tokens.flatten(0, 1)).softmax(-1)
    return scores.reshape(len(tokens), CELLS, CELLS, 3)


def ordered(expected: Tensor, depth: Tensor) -> float:
    """Share of scenes in which the shape in front is deemed nearer."""
    nearer = [
        bool(of_scene[truth == 2].mean() > of_scene[truth == 1].mean())
        for of_scene, truth in zip(expected, depth, strict=True)
    ]
    return sum(nearer) / len(nearer)


train_inputs, test_inputs = inputs_of(train_scenes), inputs_of(test_scenes)
steps = torch.arange(3.0)
found: dict[str, Tensor] = {}
order: dict[str, float] = {}
on_shapes = test_depth > 0
print(f"depth of two overlapping shapes, {len(test_scenes)} new scenes, {options.backbone}")
print(f"  {'input':20}{'cells right':>12}{'order right':>12}")
print(f"  {'chance':20}{0.5:12.3f}{0.5:12.3f}")
for name, tokens in train_inputs.items():
    chances = predict(fit(tokens, train_depth), test_inputs[name])
    found[name] = chances @ steps
    nearer_step = chances[..., 1:].argmax(-1) + 1
    cells = float((nearer_step == test_depth)[on_shapes].float().mean())
    order[name] = ordered(found[name], test_depth)
    print(f"  {name:20}{cells:12.3f}{order[name]:12.3f}")

# %% [markdown]
# Some of the scenes: the picture, the true depth, and the depth that each input gives. Light is
# near.

# %%


def shaded(depth: Tensor) -> Image.Image:
    return HeatMap(depth.float(), low=0, high=2).to_pil(160, resample="nearest")


rows = [
    [
        Panel(render(scene, SIDE), "picture", caption_of(scene)),
        Panel(shaded(test_depth[index]), "truth"),
        *(Panel(shaded(maps[index]), f"from {name}") for name, maps in found.items()),
    ]
    for index, scene in enumerate(test_scenes[:4])
]
drawn = figure(
    rows,
    title="What lies in front, from pixels, from latents and from features",
    note=f"Model: {options.backbone}. Dark: background, red: behind, light: in front.",
    side=160,
)
drawn.save(options.output)
print(f"wrote {options.output}")

# %%
drawn

# %% [markdown]
# Do the features know more of depth than what the U-Net starts from? Most scenes that the bundled
# model was trained on keep their shapes apart: what it knows of hiding, it has from few pictures.

# %%
print(f"order right: features {order['features']:.2f}, latents {order['latents']:.2f}, chance 0.50")
