"""Train the text encoder of the miniature diffusion model, contrastively, against the truth.

    python tools/shapes/train_text.py --steps 3000

Stable Diffusion's text encoder was trained by CLIP before it was frozen. Here the other side of the
contrast is not a vision tower but the scene itself, read object by object, which is cheaper and
learns sooner. Half of a batch are near twins of the other half (colours swapped, relation turned,
sizes exchanged ...), so that word order matters. Only the text encoder is kept.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_clip import batch, different_captions, tokens
from training import VALIDATION_SEED, Run
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffenc.shapes.pairs import WINOGROUND_KINDS, winoground_items
from diffenc.shapes.scenes import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, Scene

WIDTH = 128
PAIRS = ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1))


class SceneReader(nn.Module):
    """Scenes to unit vectors: two layers over tokens, and a mean.

    One token an object, one for each two objects that stand in a clear relation, in both orders,
    and one for the background.
    """

    def __init__(self) -> None:
        super().__init__()
        self.colors = nn.Embedding(len(COLORS), WIDTH)
        self.shapes = nn.Embedding(len(SHAPES), WIDTH)
        self.sizes = nn.Embedding(len(SIZES), WIDTH)
        self.backgrounds = nn.Embedding(len(BACKGROUNDS), WIDTH)
        self.places = nn.Linear(16, WIDTH)
        self.relations = nn.Embedding(len(RELATIONS), WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, scenes: Sequence[Scene]) -> Tensor:
        kinds = torch.zeros(len(scenes), 3, 3, dtype=torch.long)
        centers = torch.zeros(len(scenes), 3, 2)
        relations = torch.zeros(len(scenes), len(PAIRS), dtype=torch.long)
        absent = torch.ones(len(scenes), 3 + len(PAIRS) + 1, dtype=torch.bool)
        absent[:, -1] = False
        for row, scene in enumerate(scenes):
            for column, thing in enumerate(scene.objects):
                words = (
                    COLORS.index(thing.color),
                    SHAPES.index(thing.shape),
                    SIZES.index(thing.size),
                )
                kinds[row, column] = torch.tensor(words)
                centers[row, column] = torch.tensor((thing.x, thing.y))
                absent[row, column] = False
            for column, pair in enumerate(PAIRS):
                if max(pair) < len(scene.objects) and (relation := scene.relation(*pair)):
                    relations[row, column] = RELATIONS.index(relation)
                    absent[row, 3 + column] = False
        grounds = torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
        angles = centers[..., None] * torch.tensor([1.0, 2.0, 4.0, 8.0]) * math.pi
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2)
        looks = self.colors(kinds[..., 0]) + self.shapes(kinds[..., 1])
        looks = looks + self.sizes(kinds[..., 2])
        left, right = (looks[:, list(column)] for column in zip(*PAIRS, strict=True))
        related = self.first(left) + self.relations(relations) + self.second(right)
        ground = self.backgrounds(grounds)[:, None]
        states = torch.cat([looks + self.places(waves), related, ground], dim=1)
        states = self.layers(states, src_key_padding_mask=absent)
        kept = (~absent).float()[..., None]
        return F.normalize(self.head((states * kept).sum(1) / kept.sum(1)), dim=-1)


def build(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_attention_heads=4,
            num_hidden_layers=3,
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


WORD_CLASSES: tuple[tuple[tuple[str, ...], ...], ...] = (
    tuple((color,) for color in COLORS),
    tuple((shape, f"{shape}s") for shape in SHAPES),
    (("small",), ("large", "big")),
    (("left",), ("right",), ("above", "over", "top"), ("below", "under", "bottom"), ("middle",)),
)


def words_in_order(text: str) -> list[int]:
    """For each class, which of its words comes first and which second; 0 is none."""
    found = []
    words = text.replace(",", " ").replace("?", " ").split()
    for groups in WORD_CLASSES:
        seen = [i for word in words for i, group in enumerate(groups, start=1) if word in group]
        found += [*seen, 0, 0][:2]
    return found


class Contrast(nn.Module):
    """Text encoder, scene reader and temperature."""

    def __init__(self, text: CLIPTextModel) -> None:
        super().__init__()
        self.text, self.scenes = text, SceneReader()
        self.projection = nn.Linear(WIDTH, WIDTH, bias=False)
        self.word_heads = nn.ModuleList(
            nn.Linear(WIDTH, len(groups) + 1) for groups in WORD_CLASSES for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, scenes: Sequence[Scene], ids: Tensor) -> Tensor:
        """Logits (scenes, texts)."""
        return self.match(scenes, self.text(ids).pooler_output)

    def match(self, scenes: Sequence[Scene], pooled: Tensor) -> Tensor:
        """Logits (scenes, texts) from the text's end state."""
        pooled = F.normalize(self.projection(pooled), dim=-1)
        logits: Tensor = self.log_scale.exp().clamp(max=100) * self.scenes(scenes) @ pooled.T
        return logits

    def reading_loss(self, pooled: Tensor, texts: Sequence[str]) -> Tensor:
        """Cross-entropy of reading the words, in order, off the end state.

        "left" and "right" start out exchangeable on both sides of the contrast, a saddle that
        it did not leave in thousands of steps; this makes the text side tell them apart.
        """
        facts = torch.tensor([words_in_order(text) for text in texts]).T
        losses = [
            F.cross_entropy(head(pooled), fact)
            for head, fact in zip(self.word_heads, facts, strict=True)
        ]
        return torch.stack(losses).sum()


def twin_loss(logits: Tensor) -> Tensor:
    """Cross-entropy between each text's scene and its twin, and each scene's text and its twin."""
    half = len(logits) // 2
    own = logits.diagonal()
    other = torch.cat([logits[:half, half:].diagonal(), logits[half:, :half].diagonal()])
    turned = torch.cat([other[half:], other[:half]])
    return (F.softplus(other - own) + F.softplus(turned - own)).mean() / 2


@torch.no_grad()
def measure(model: Contrast, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """Percentages: one of 64 captions, and the text score of each Winoground-like kind."""
    model.eval()
    right = []
    for index in range(8):
        scenes, texts = different_captions(64, f"text/{VALIDATION_SEED + index}")
        logits = model(scenes, tokens(tokenizer, texts))
        right.append((logits.argmax(dim=1) == torch.arange(64)).float().mean())
    found = {"one_of_64": 100 * float(torch.stack(right).mean())}
    for kind in WINOGROUND_KINDS:
        items = winoground_items(100, seed=VALIDATION_SEED, kinds=[kind])
        hits = 0
        for item in items:
            scores = model(item.scenes, tokens(tokenizer, list(item.captions)))
            hits += bool(scores[0, 0] > scores[0, 1] and scores[1, 1] > scores[1, 0])
        found[kind] = float(hits)
    model.train()
    return {name: round(value, 1) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", type=Path, default=Path("runs/shapes-text"))
    parser.add_argument("--warm-start", type=Path, help="state.pt of another run")
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/shapes/tokenizer"))
    parser.add_argument("--output", type=Path, default=Path("runs/shapes/text_encoder"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(options.tokenizer)
    model = Contrast(build(tokenizer))
    if options.warm_start is not None:
        state = torch.load(options.warm_start, weights_only=True)["modules"]
        model.load_state_dict(
            {key.removeprefix("model."): value for key, value in state.items()}, strict=False
        )
    run = Run(options.run, {"model": model}, steps=options.steps, lr=1e-3, ema_decay=0.995)
    target = torch.arange(options.batch)
    while run.step < options.steps:
        scenes, texts = batch(options.batch, f"text/{run.step}", hard=True)
        pooled = model.text(tokens(tokenizer, texts)).pooler_output
        logits = model.match(scenes, pooled)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss = loss + twin_loss(logits) + 0.2 * model.reading_loss(pooled, texts)
        run.update(loss)
        if run.step % 50 == 0:
            run.log(loss=round(loss.item(), 4))
        if run.step % 300 == 0 or run.step == options.steps:
            run.swap_average()
            run.log(**measure(model, tokenizer))
            model.text.save_pretrained(options.output)
            run.swap_average()
            run.save()
    run.swap_average()
    print(json.dumps(measure(model, tokenizer)))


if __name__ == "__main__":
    main()
