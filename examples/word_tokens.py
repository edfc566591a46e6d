# %% [markdown]
# # One token a word
#
# A grid gives a token for every cell. A question can do with fewer: each word's token is the mean
# of the features where the word is seen. Does the one token of "circle" say what color the circle
# is? A linear layer, trained on some scenes and tried on new ones, tells. Nothing else is trained.

# %%
import random

import torch
from torch import Tensor

from diffenc import DiffusionEncoder
from diffenc.denoiser.gathering import gather
from diffenc.shapes import Scene, SceneObject, masks, render, sample_scenes
from diffenc.shapes.scenes import COLORS
from diffenc.viz import HeatMap, Panel, figure

COUNT, SEED = 90, 0

encoder = DiffusionEncoder.from_pretrained("shapes")


# %% [markdown]
# Scenes of three objects, of three shapes and three colors, and one of them to ask about.


# %%
def asked_scenes(count: int, seed: int) -> list[tuple[Scene, SceneObject]]:
    """Scenes, each with the object that the question is about."""
    rng = random.Random(seed)
    chosen: list[tuple[Scene, SceneObject]] = []
    for scene in sample_scenes(100 * count, seed=950_000 + 100_000 * seed):
        shapes = {thing.shape for thing in scene.objects}
        if len(shapes) == 3 and len({thing.color for thing in scene.objects}) == 3:
            chosen.append((scene, rng.choice(scene.objects)))
        if len(chosen) == count:
            break
    return chosen


# %% [markdown]
# For each scene four vectors are read under the question: the mean of all cells, the token of the
# noun, the token of the word that tells most, whichever it is, and the mean over the object's true
# mask. The mask is what nobody has on a picture of their own: it shows how much there is to gain.


# %%
def read(pairs: list[tuple[Scene, SceneObject]]) -> tuple[dict[str, Tensor], Tensor]:
    """Vectors (scenes, channels) by name, and the centre of each noun (scenes, 2)."""
    questions = [f"what color is the {thing.shape}?" for _, thing in pairs]
    images = [render(scene) for scene, _ in pairs]
    question = encoder.word_tokens(images, questions)
    nouns = [row.index(thing.shape) for row, (_, thing) in zip(question.words, pairs, strict=True)]
    rows = torch.arange(len(pairs))
    truth = torch.stack(
        [
            torch.from_numpy(masks(scene)[scene.objects.index(thing)]).float()
            for scene, thing in pairs
        ]
    )
    by_mask = [gather(maps, truth[:, None])[:, 0] for maps in question.features.values()]
    one = encoder.word_tokens(images, questions, count=1)
    vectors = {
        "mean of all cells": question.features.tokens(1)[:, 0],
        "token of the noun": question.tokens[rows, nouns],
        "token of the word that tells most": one.tokens[:, 0],
        "mean over the true mask": torch.cat(by_mask, dim=1),
    }
    return vectors, question.places[rows, nouns, :2]


def named(vectors: Tensor, labels: Tensor) -> float:
    """Share of colors that a linear layer names in the last third, fit to the others."""
    fit = 2 * len(labels) // 3
    mean, deviation = vectors[:fit].mean(0), vectors[:fit].std(0) + 1e-6
    inputs = torch.cat([(vectors - mean) / deviation, torch.ones(len(labels), 1)], dim=1)
    targets = torch.nn.functional.one_hot(labels[:fit], len(COLORS)).float()
    gram = inputs[:fit].T @ inputs[:fit] + 30 * torch.eye(inputs.shape[1])
    layer = torch.linalg.solve(gram, inputs[:fit].T @ targets)
    return float(((inputs[fit:] @ layer).argmax(1) == labels[fit:]).float().mean())


# %%
pairs = asked_scenes(COUNT, SEED)
parts = [read(pairs[start : start + 30]) for start in range(0, COUNT, 30)]
labels = torch.tensor([COLORS.index(thing.color) for _, thing in pairs])
print(f"colors named from one vector, {COUNT // 3} new scenes")
for name in parts[0][0]:
    print(f"  {name:34} {named(torch.cat([vectors[name] for vectors, _ in parts]), labels):.3f}")
centres = torch.cat([places for _, places in parts])
distance = (centres - torch.tensor([[thing.y, thing.x] for _, thing in pairs])).norm(dim=1)
print(f"centre of the noun's map to centre of the object: {distance.mean():.3f} of the side")


# %% [markdown]
# ## Where the words of a question look
#
# Each token has a map. Nouns lie on their objects. "left" and "of" look at the noun before them,
# which they know of, since the text encoder reads from left to right. "is" has nothing to look at.

# %%
scene = pairs[0][0]
first, second = scene.objects[:2]
text = f"is the {first.shape} left of the {second.shape}?"
question = encoder.word_tokens(render(scene), text)
picture = render(scene, 160)
panels = [
    Panel(HeatMap(values).to_pil(160, overlay=picture), word)
    for word, values in zip(question.words[0], question.maps[0], strict=True)
]
drawn = figure([[Panel(picture, "picture"), *panels]], title=text, side=160)
drawn

# %% [markdown]
# `count=3` keeps the three words whose maps are sharp and lie apart; here "of" stands for the
# circle. `places` has row and column of each map's centre: those of the object, if all is well.

# %%
few = encoder.word_tokens(render(scene), text, count=3)
print(few.words[0], tuple(few.tokens.shape))
for thing in (first, second):
    row, column = question.places[0, question.words[0].index(thing.shape), :2].tolist()
    print(f"{thing.shape}: seen at {row:.2f} {column:.2f}, is at {thing.y:.2f} {thing.x:.2f}")
