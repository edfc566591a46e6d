# %% [markdown]
# # One token a word
# A question gathers its own tokens: each word's token is the mean of the features where the word is
# seen. One of them says what color the circle is, where the mean of all cells does not, and its
# place says where the circle is. Nothing is trained but the linear layer that names the color.

# %%
import random

import torch
from torch import Tensor

from diffenc import DiffusionEncoder
from diffenc.denoiser.gathering import gather
from diffenc.shapes import Scene, SceneObject, masks, render, sample_scenes
from diffenc.shapes.scenes import COLORS

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
# For each scene four vectors from one pass under the question: the mean of all cells, the token of
# the noun, the token of the word that tells most, whichever it is, and the mean over the true mask.


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
# The words of a question, and where each of them looks: row and column of the centre, and spread.

# %%
scene = pairs[0][0]
print(
    ", ".join(
        f"{thing.color} {thing.shape} at {thing.y:.2f} {thing.x:.2f}" for thing in scene.objects
    )
)
text = f"is the {scene.objects[0].shape} left of the {scene.objects[1].shape}?"
question = encoder.word_tokens(render(scene), text, rest=True)
for word, place in zip(question.words[0], question.places[0].tolist(), strict=True):
    print(f"  {word:10} at {place[0]:.2f} {place[1]:.2f}, spread {place[2]:.2f} {place[3]:.2f}")
print(f"three words of it: {encoder.word_tokens(render(scene), text, count=3).words[0]}")
