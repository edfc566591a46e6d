# %% [markdown]
# # Dense features to a head of your own
# A linear probe finds the pixels of one kind of shape from features of the bundled model. The same
# features are read without a text, and under a text that names the shape: what does the text add?

# %%
import torch
from torch import Tensor, nn

from diffenc import DiffusionEncoder
from diffenc.shapes import Scene, masks, render, sample_scenes
from diffenc.shapes.scenes import Shape

TARGET: Shape = "star"
GRID = 16

encoder = DiffusionEncoder.from_pretrained("shapes")


# %% [markdown]
# Features of many scenes, all taps on one grid, and the truth per cell: the share of it that the
# shape covers, from the renderer's masks.


# %%
def features_of(scenes: list[Scene], prompt: str | None) -> Tensor:
    """(scenes, cells, channels)."""
    images = [render(scene) for scene in scenes]
    parts = [
        encoder.extract(images[start : start + 25], prompt).tokens(GRID)
        for start in range(0, len(images), 25)
    ]
    return torch.cat(parts)


def truth_of(scenes: list[Scene]) -> Tensor:
    """(scenes, cells): whether the shape covers most of a cell."""
    rows = []
    for scene in scenes:
        wanted = [thing.shape == TARGET for thing in scene.objects]
        pixels = torch.from_numpy(masks(scene))[wanted].any(0).float()
        cells = pixels.unflatten(0, (GRID, -1)).unflatten(2, (GRID, -1)).mean((1, 3))
        rows.append((cells > 0.5).flatten())
    return torch.stack(rows)


def with_target(count: int, seed: int) -> list[Scene]:
    """Scenes of several objects, one of them at least of the kind that is looked for."""
    scenes = sample_scenes(20 * count, seed=seed)
    return [s for s in scenes if 0 < s.count(shape=TARGET) < len(s.objects)][:count]


# %% [markdown]
# A linear layer per cell, trained with logistic regression; intersection over union on new scenes.


# %%
def probe(train: Tensor, train_truth: Tensor, test: Tensor, test_truth: Tensor) -> float:
    """Intersection over union of the probe's cells with the truth."""
    mean, deviation = train.mean((0, 1)), train.std((0, 1)) + 1e-6
    layer = nn.Linear(train.shape[-1], 1)
    nn.init.zeros_(layer.weight)
    weight = (~train_truth).sum() / train_truth.sum()
    loss = nn.BCEWithLogitsLoss(pos_weight=weight.sqrt())
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05, weight_decay=1e-4)
    inputs, labels = ((train - mean) / deviation).flatten(0, 1), train_truth.flatten().float()
    for _ in range(150):
        optimizer.zero_grad()
        loss(layer(inputs)[:, 0], labels).backward()
        optimizer.step()
    found = layer((test - mean) / deviation)[..., 0] > 0
    return float((found & test_truth).sum() / (found | test_truth).sum())


torch.manual_seed(0)
train_scenes, test_scenes = with_target(100, seed=1), with_target(50, seed=950_000)
train_truth, test_truth = truth_of(train_scenes), truth_of(test_scenes)
print(f"IoU of a linear probe for {TARGET!r}, {len(test_scenes)} new scenes")
for prompt in (None, f"a {TARGET}", "a circle and a square"):
    train, test = features_of(train_scenes, prompt), features_of(test_scenes, prompt)
    score = probe(train, train_truth, test, test_truth)
    print(f"  {prompt or 'no text':24} {score:.3f}")
