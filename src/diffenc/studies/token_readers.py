"""Readers of tokens: of answers, by one attention, and of cells, through a projector."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diffenc.projector.plain import Projector
from diffenc.shapes.render import masks
from diffenc.shapes.scenes import COLORS, SHAPES
from diffenc.studies.trials import CLASSES, Property, Trial

Reader = Literal["told", "blind"]
READERS: tuple[Reader, ...] = get_args(Reader)

ASKED: tuple[Property, ...] = ("color", "shape", "position")
"""Properties that the questions ask for."""

_BATCH, _RATE, _DECAY = 64, 5e-2, 0.3
_PROJECTOR_WIDTH, _PROJECTOR_RATE = 64, 1e-3  # LLaVA's rate for projectors
_LENGTH = 4.0  # of a standardised token, whatever its number of channels


@dataclass(frozen=True, slots=True)
class Questions:
    """Three questions to each scene: row 3 s + k is about property k of scene s.

    Attributes:
        texts: Text of the question of each row.
        labels: Index of the right answer of each row, counted through the answers of all
            properties.
        queries: Number that stands for what each reader knows of a row: the question's text for
            "told", the property alone for "blind".
        allowed: Whether a property has an answer, for each property and answer.
        count: Number of different queries.
    """

    texts: tuple[str, ...]
    labels: Int[Tensor, " rows"]
    queries: dict[Reader, Int[Tensor, " rows"]]
    allowed: Bool[Tensor, "properties answers"]
    count: int

    @classmethod
    def of(cls, trials: Sequence[Trial]) -> "Questions":
        """The questions to these scenes."""
        texts = tuple(trial.question(name) for trial in trials for name in ASKED)
        known = {text: index for index, text in enumerate(sorted(set(texts)))}
        first = [sum(CLASSES[name] for name in ASKED[:k]) for k in range(len(ASKED) + 1)]
        labels = [first[k] + trial.label(name) for trial in trials for k, name in enumerate(ASKED)]
        place: dict[str, Any] = {"dtype": torch.long, "device": "cpu"}
        answers = torch.arange(first[-1], **place)
        return cls(
            texts,
            torch.tensor(labels, **place),
            {
                "told": torch.tensor([known[text] for text in texts], **place),
                "blind": len(known) + torch.arange(len(ASKED), **place).repeat(len(trials)),
            },
            torch.stack([(answers >= a) & (answers < b) for a, b in pairwise(first)]),
            len(known) + len(ASKED),
        )

    def loss(
        self, logits: Float[Tensor, "n answers"], rows: Int[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy among the answers that the property has."""
        return F.cross_entropy(self.masked(logits, rows), self.labels[rows])

    def masked(
        self, logits: Float[Tensor, "n answers"], rows: Int[Tensor, " n"]
    ) -> Float[Tensor, "n answers"]:
        """Logits without the answers that make no sense."""
        return logits.masked_fill(~self.allowed[rows % len(ASKED)], float("-inf"))


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Tokens of all rows, kept once for rows that share them.

    Attributes:
        sources: Tensors whose channels are concatenated; each with a set of tokens for every row,
            or for every scene.
        rows: Number of rows.
    """

    sources: tuple[Float[Tensor, "_sets n _c"], ...]
    rows: int

    def take(self, rows: Int[Tensor, " k"]) -> Float[Tensor, "k n c"]:
        """Tokens of some rows."""
        parts = [tokens[rows // (self.rows // len(tokens))] for tokens in self.sources]
        return torch.cat(parts, dim=-1).float()

    def statistics(self, rows: int) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Mean and deviation per channel over the first rows."""
        first = [
            tokens[: rows * len(tokens) // self.rows].float().flatten(0, 1)
            for tokens in self.sources
        ]
        return (
            torch.cat([part.mean(dim=0) for part in first]),
            torch.cat([part.std(dim=0) for part in first]),
        )


class AnswerReader(nn.Module):
    """Linear reader of answers that attends to the tokens by a query of the question.

    It is the least that can follow a question: a linear probe whose average over the tokens is
    weighted by a query of the question, as in one attention head of a language model. All weights
    begin at zero, so that it begins as the plain average.

    Args:
        mean: Mean of each channel of the tokens.
        deviation: Standard deviation of each channel of the tokens.
        tokens: Number of tokens of a picture.
        queries: Number of different queries.
        answers: Number of different answers.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, mean: Tensor, deviation: Tensor, *, tokens: int, queries: int, answers: int
    ) -> None:
        super().__init__()
        channels = len(mean)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", _LENGTH / channels**0.5 / deviation.clamp_min(1e-6))
        place: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        self.query = nn.Parameter(torch.zeros(queries, channels, **place))
        self.value = nn.Parameter(torch.zeros(answers, channels, **place))
        self.place = nn.Parameter(torch.zeros(answers, tokens, **place))
        self.prior = nn.Parameter(torch.zeros(queries, answers, **place))

    def forward(
        self, tokens: Float[Tensor, "b n c"], queries: Int[Tensor, " b"]
    ) -> Float[Tensor, "b answers"]:
        """Logits of the answers."""
        standard = (tokens.float() - self.mean) * self.scale
        weights = einsum(standard, self.query[queries], "b n c, b c -> b n").softmax(dim=1)
        gathered = einsum(weights, standard, "b n, b n c -> b c")
        return gathered @ self.value.T + weights @ self.place.T + self.prior[queries]


def fit_reader(
    tokens: TokenRows, questions: Questions, reader: Reader, *, split: int, epochs: int, seed: int
) -> AnswerReader:
    """Fit a reader to the answers of the first `split` rows.

    Args:
        tokens: Tokens of all rows.
        questions: Questions of all rows.
        reader: Kind of reader, which says what it knows of a question: "told" or "blind".
        split: Number of rows to fit, counted from the first.
        epochs: Number of passes over these rows.
        seed: Seed of the order of rows.
    """
    mean, deviation = tokens.statistics(split)
    model = AnswerReader(
        mean,
        deviation,
        tokens=tokens.sources[0].shape[1],
        queries=questions.count,
        answers=questions.allowed.shape[1],
    )
    batches = shuffled(split, _BATCH, epochs=epochs, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=len(batches))

    def loss(rows: Tensor) -> Tensor:
        return questions.loss(model(tokens.take(rows), questions.queries[reader][rows]), rows)

    descend(optimizer, schedule, batches, loss)
    return model.eval().requires_grad_(False)


def accuracy_of(
    model: AnswerReader, tokens: TokenRows, questions: Questions, reader: Reader, *, split: int
) -> dict[Property, float]:
    """Share of right answers per property among the rows from `split` on."""
    rows = torch.arange(split, tokens.rows, dtype=torch.long, device="cpu")
    right = torch.cat(
        [
            questions.masked(
                model(tokens.take(part), questions.queries[reader][part]), part
            ).argmax(1)
            == questions.labels[part]
            for part in rows.split(4 * _BATCH)
        ]
    )
    shares = right.double().view(-1, len(ASKED)).mean(dim=0)
    return dict(zip(ASKED, shares.tolist(), strict=True))


def shuffled(count: int, batch_size: int, *, epochs: int, seed: int) -> list[Int[Tensor, " n"]]:
    """Batches of the numbers below `count`, which each epoch has in another order."""
    order = torch.Generator("cpu").manual_seed(seed)
    epochs_of_rows = (
        torch.randperm(count, generator=order, dtype=torch.long, device="cpu")
        for _ in range(epochs)
    )
    return [rows for epoch in epochs_of_rows for rows in epoch.split(batch_size)]


def descend(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batches: Iterable[Int[Tensor, " n"]],
    loss: Callable[[Tensor], Tensor],
) -> None:
    """Take one step down the loss of each batch."""
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        schedule.step()


def cell_kinds(trials: Sequence[Trial], size: int, grid: int) -> Int[Tensor, "scenes cells"]:
    """Kind (colour and shape) of the object that covers most of each cell; -1 where none does."""
    rows = []
    for trial in trials:
        covers = torch.from_numpy(np.asarray(masks(trial.scene, size))).float()
        shares = F.adaptive_avg_pool2d(covers[:, None], (grid, grid)).flatten(1)
        most, which = shares.max(dim=0)
        kinds = torch.tensor(
            [
                len(SHAPES) * COLORS.index(thing.color) + SHAPES.index(thing.shape)
                for thing in trial.scene.objects
            ],
            dtype=torch.long,
            device="cpu",
        )
        rows.append(torch.where(most > 0.5, kinds[which], -1))
    return torch.stack(rows)


def scale_cases(taps: int) -> list[tuple[float, ...]]:
    """Features as they are, and with the first or the last tap a hundred times as large."""
    plain = (1.0,) * taps
    return [plain, (100.0, *plain[1:]), (*plain[:-1], 100.0)] if taps > 1 else [plain]


def norm_accuracy(
    tokens: Float[Tensor, "scenes cells c"],
    kinds: Int[Tensor, "scenes cells"],
    widths: Sequence[int],
    scales: Sequence[float],
    *,
    norm: bool,
    split: int,
    epochs: int,
    seed: int,
) -> float:
    """Train projector and classifier on cells of the first scenes; share right in the others.

    Args:
        tokens: Features of all taps, with the taps' channels side by side.
        kinds: Kind of the object in each cell, see `cell_kinds`.
        widths: Number of channels of each tap.
        scales: Factor that each tap's features are multiplied by.
        norm: Whether the projector has a layer norm per tap.
        split: Number of scenes to train on, counted from the first.
        epochs: Number of passes over their cells.
        seed: Seed of the initial weights and of the order of cells.
    """
    place: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    factors = torch.cat(
        [torch.full((width,), scale, **place) for width, scale in zip(widths, scales, strict=True)]
    )
    inputs, known = tokens.float() * factors, kinds >= 0
    train, labels = inputs[:split][known[:split]], kinds[:split][known[:split]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            Projector(sum(widths), _PROJECTOR_WIDTH, norm_channels=widths if norm else ()),
            nn.LayerNorm(_PROJECTOR_WIDTH, **place),
            nn.Linear(_PROJECTOR_WIDTH, len(COLORS) * len(SHAPES), **place),
        )
        orders = (torch.randperm(len(train), dtype=torch.long, device="cpu") for _ in range(epochs))
        batches = [batch for order in orders for batch in order.split(_BATCH)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PROJECTOR_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    descend(
        optimizer,
        schedule,
        batches,
        lambda cells: F.cross_entropy(model(train[cells]), labels[cells]),
    )
    with torch.no_grad():
        answers = model(inputs[split:][known[split:]]).argmax(dim=1)
    return float((answers == kinds[split:][known[split:]]).double().mean())
