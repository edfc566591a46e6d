"""Does a projector need a layer norm for each tap? A probe of cells, trained through both kinds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diffenc.projector.plain import Projector
from diffenc.shapes.render import masks
from diffenc.shapes.scenes import COLORS, SHAPES
from diffenc.studies.trials import Trial

_WIDTH, _BATCH, _RATE = 64, 64, 1e-3  # LLaVA's rate for projectors


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
            Projector(sum(widths), _WIDTH, norm_channels=widths if norm else ()),
            nn.LayerNorm(_WIDTH, **place),
            nn.Linear(_WIDTH, len(COLORS) * len(SHAPES), **place),
        )
        orders = (torch.randperm(len(train), dtype=torch.long, device="cpu") for _ in range(epochs))
        batches = [batch for order in orders for batch in order.split(_BATCH)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(train[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = model(inputs[split:][known[split:]]).argmax(dim=1)
    return float((found == kinds[split:][known[split:]]).double().mean())
