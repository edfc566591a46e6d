# %% [markdown]
# # Fine-tuning the encoder with LoRA
# A small head answers questions about pictures from features alone. It never reads the question:
# the question is the text of the U-Net, and what the head knows of it has come through
# cross-attention. LoRA on that cross-attention is trained together with the head, and compared with
# a head that gets as many more steps on the frozen encoder.

# %%
import argparse
import random
import sys
import time

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from diffenc import DiffusionEncoder
from diffenc.shapes import questions, render, sample_scenes

parser = argparse.ArgumentParser(description="LoRA and a small head, questions as prompts.")
parser.add_argument("--backbone", default="shapes", help="for photographs: sd2.1-base")
parser.add_argument("--train", type=int, default=1500, help="questions to train on")
parser.add_argument("--test", type=int, default=400, help="questions on new scenes")
parser.add_argument("--head-steps", type=int, default=400, help="of the head, on frozen features")
parser.add_argument("--steps", type=int, default=240, help="of LoRA and head together")
parser.add_argument("--rank", type=int, default=8, help="of LoRA")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", "-o", default="", help="a folder for the trained encoder")
options = parser.parse_args([] if hasattr(sys, "ps1") else None)  # a notebook has no options

torch.manual_seed(options.seed)
encoder = DiffusionEncoder.from_pretrained(options.backbone)
SIDE = encoder.backbone.default_size
KINDS = ("color", "shape")

# %% [markdown]
# Questions for colour and shape, one per scene. Several objects are in most scenes, so the answer
# depends on the question. Scenes for the test have seeds that no bundled model was trained on.


# %%
def asked(count: int, seed: int) -> tuple[list[Image.Image], list[str], list[str]]:
    """Pictures, questions and answers."""
    rng = random.Random(seed)
    rows = []
    for scene in sample_scenes(3 * count, seed=seed):
        if fitting := [q for q in questions(scene, seed=seed) if q.kind in KINDS]:
            question = rng.choice(fitting)
            rows.append((render(scene, SIDE), question.text, question.answer))
    images, texts, answers = zip(*rows[:count], strict=True)
    return list(images), list(texts), list(answers)


train_images, train_texts, train_answers = asked(options.train, seed=1)
test_images, test_texts, test_answers = asked(options.test, seed=950_000)
ANSWERS = sorted({*train_answers, *test_answers})
train_labels = torch.tensor([ANSWERS.index(answer) for answer in train_answers])
test_labels = torch.tensor([ANSWERS.index(answer) for answer in test_answers])


# %% [markdown]
# The head: every cell is normalised and mapped to hidden units, their mean and their maximum over
# the cells to the answers.


# %%
class Head(nn.Module):
    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.cells = nn.Linear(channels, width)
        self.answers = nn.Linear(2 * width, len(ANSWERS))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.gelu(self.cells(self.norm(tokens)))
        scores: Tensor = self.answers(torch.cat([hidden.mean(1), hidden.amax(1)], dim=-1))
        return scores


def features(images: list[Image.Image], texts: list[str]) -> Tensor:
    with torch.no_grad():
        parts = [
            encoder(images[start : start + 25], texts[start : start + 25])
            for start in range(0, len(images), 25)
        ]
    return torch.cat(parts).float()


def accuracy(head: Head, tokens: Tensor) -> float:
    with torch.no_grad():
        return float((head(tokens).argmax(-1) == test_labels).float().mean())


def train_head(head: Head, tokens: Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.01)
    for _ in range(steps):
        rows = torch.randint(len(tokens), (32,))
        optimizer.zero_grad()
        F.cross_entropy(head(tokens[rows]), train_labels[rows]).backward()
        optimizer.step()


# %% [markdown]
# Before: the head on frozen features.

# %%
started = time.process_time()
frozen, frozen_test = features(train_images, train_texts), features(test_images, test_texts)
head = Head(encoder.hidden_size)
train_head(head, frozen, options.head_steps, 2e-3)
common = F.one_hot(test_labels, len(ANSWERS)).float().mean(0).max()
print(f"answers right on {len(test_labels)} new scenes, {options.backbone}, of {len(ANSWERS)}")
print(f"  {'most common answer':34} {common:.3f}")
print(f"  {'frozen encoder, head':34} {accuracy(head, frozen_test):.3f}")

# %% [markdown]
# Control: the same head goes on alone for as many steps as LoRA will get.

# %%
control = Head(encoder.hidden_size)
control.load_state_dict(head.state_dict())
train_head(control, frozen, options.steps, 1e-3)
print(f"  {'frozen encoder, head trained on':34} {accuracy(control, frozen_test):.3f}")

# %% [markdown]
# LoRA and the head together. Only `trainable_parameters` get a gradient; latents of the pictures
# and prompts of the questions are remembered, features are computed anew in every step.

# %%
encoder.add_lora(rank=options.rank)
print(encoder.summary())
groups = [
    {"params": list(encoder.trainable_parameters()), "lr": 1e-3},
    {"params": list(head.parameters()), "lr": 1e-3},
]
optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / options.steps)
)
encoder.train()
for step in range(options.steps):
    rows = torch.randint(len(train_labels), (16,)).tolist()
    tokens = encoder([train_images[i] for i in rows], [train_texts[i] for i in rows])
    loss = F.cross_entropy(head(tokens.float()), train_labels[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 50 == 0:
        print(f"step {step}, loss {loss.item():.2f}, {time.process_time() - started:.0f} s of CPU")
encoder.eval()
tuned = accuracy(head, features(test_images, test_texts))
print(f"  {'LoRA and head':34} {tuned:.3f}")

# %% [markdown]
# Without the adapter the same head sees features that it was not trained on, which tells how much
# LoRA has changed them. Read the table by its control: only what LoRA has beyond a head that was
# trained as long counts for it, and two standard errors from one seed are weak evidence. The page
# "What each part adds" has three seeds. With `--output` both parts are saved in one folder.

# %%
encoder.set_lora(None)
plain = accuracy(head, features(test_images, test_texts))
print(f"  {'the same head without LoRA':34} {plain:.3f}")
encoder.set_lora("default")
deviation = (tuned * (1 - tuned) / len(test_labels)) ** 0.5
print(f"a standard error of each number is {deviation:.3f}")
if options.output:
    encoder.save_pretrained(options.output)
    again = DiffusionEncoder.from_pretrained(options.output)
    difference = (
        again(test_images[:2], test_texts[:2]) - encoder(test_images[:2], test_texts[:2])
    ).abs()
    print(f"wrote {options.output}; read again, features differ by {difference.max():.1g}")
