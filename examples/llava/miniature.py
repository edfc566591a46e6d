"""A miniature of LLaVA on two CPU cores: tower, projector, a tiny Llama, questions about shapes.

    python examples/llava/miniature.py --prompt question
    python examples/llava/miniature.py --prompt empty

The language model reads the picture's tokens and the question, and names the answer. The tower
reads the question too, or nothing. Projector, language model and the tower's adapter are trained
together, from scratch, and asked about scenes that they have not seen.
"""

import argparse
import random
import time

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.projector import Projector
from diffenc.shapes import questions, render, sample_scenes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--prompt", choices=("question", "empty"), default="question")
parser.add_argument("--tower", default="diffenc:shapes?t=50&grid=4", help="add &rank=8 to train it")
parser.add_argument("--scenes", type=int, default=1500)
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
torch.manual_seed(options.seed)


def samples(count: int, seed: int) -> list[tuple[torch.Tensor, str, str]]:
    """Picture, question and answer; one question for each scene."""
    rng, found = random.Random(seed), []
    for index, scene in enumerate(sample_scenes(count, seed=seed)):
        asked = [q for q in questions(scene, seed=index) if q.kind in ("color", "count", "shape")]
        if asked:
            chosen = rng.choice(asked)
            pixel_values = tower.image_processor(render(scene), return_tensors="pt")["pixel_values"]
            found.append((pixel_values[0], chosen.text, chosen.answer))
    return found


class MiniatureLlava(nn.Module):
    """Projector and language model; the answer is read after the last word."""

    def __init__(self, words: int, answers: int, width: int = 128) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        self.llama = LlamaModel(config)
        self.projector = Projector(
            tower.hidden_size, width, norm_channels=tower.spec.token_channels
        )
        self.answer = nn.Linear(width, answers)

    def forward(self, tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Scores of the answers, from vision tokens and the question's words."""
        embeds = torch.cat([self.projector(tokens), self.llama.embed_tokens(words)], dim=1)
        states = self.llama(inputs_embeds=embeds).last_hidden_state
        scores: torch.Tensor = self.answer(states[:, -1])
        return scores


tower = DiffusionVisionTower(options.tower)
training = samples(options.scenes, seed=options.seed)
heldout = samples(max(20, options.scenes // 5), seed=options.seed + 10_000)
vocabulary = {w: i + 1 for i, w in enumerate(sorted({w for s in training for w in s[1].split()}))}
answers = {a: i for i, a in enumerate(sorted({s[2] for s in training}))}
heldout = [s for s in heldout if s[2] in answers]
longest = max(len(s[1].split()) for s in training + heldout)


def batch(part: list[tuple[torch.Tensor, str, str]]) -> tuple[torch.Tensor, ...]:
    """Vision tokens under the prompt, words padded on the left, and answers."""
    prompts = [text if options.prompt == "question" else "" for _, text, _ in part]
    tokens = tower(torch.stack([picture for picture, _, _ in part]), prompts)
    ids = [[vocabulary.get(word, 0) for word in text.split()] for _, text, _ in part]
    words = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    return tokens, words, torch.tensor([answers[answer] for _, _, answer in part])


def accuracy(part: list[tuple[torch.Tensor, str, str]]) -> float:
    """Share of right answers."""
    right = 0
    with torch.no_grad():
        for start in range(0, len(part), 50):
            tokens, words, targets = batch(part[start : start + 50])
            right += int((model(tokens, words).argmax(dim=1) == targets).sum())
    return right / len(part)


model = MiniatureLlava(len(vocabulary) + 1, len(answers))
parameters = [*model.parameters(), *tower.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=options.steps)
# A frozen tower gives the same tokens in every epoch: it runs once.
known = None
if not list(tower.parameters()):
    parts = [batch(training[i : i + 50]) for i in range(0, len(training), 50)]
    known = [torch.cat(column) for column in zip(*parts, strict=True)]
began, rng = time.monotonic(), random.Random(options.seed)
for step in range(options.steps):
    rows = rng.sample(range(len(training)), min(32, len(training)))
    tokens, words, targets = (
        [column[rows] for column in known] if known else batch([training[row] for row in rows])
    )
    loss = F.cross_entropy(model(tokens, words), targets)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
most = max(sum(s[2] == answer for s in heldout) for answer in answers) / len(heldout)
print(f"prompt={options.prompt}, tower={options.tower}, {time.monotonic() - began:.0f} s")
print(f"held-out accuracy {accuracy(heldout):.3f} of {len(heldout)}; most common answer {most:.3f}")
