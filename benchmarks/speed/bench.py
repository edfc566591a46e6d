"""Where and how contenders are measured: the model at hand, device, dtype, how often."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffenc.models import Backbone, load_backbone


class DisagreementError(Exception):
    """Contenders computed different things, so that their times cannot be compared."""


@dataclass(slots=True, kw_only=True)
class Bench:
    """What every measurement needs.

    Attributes:
        folder: Gives a model's folder, and builds it where it is missing.
        device: Where contenders run.
        dtype: Of the weights.
        rate: Floating point operations a second of a large matrix product.
        repeats: Timed calls per contender.
        quick: Narrow models, small pictures.
        limit: Seconds of calls per case and batch, after which there are no more repeats.
        timer: Clock of the calls.
        notes: What was left out, and why.
        loaded: The model at hand and its name.
    """

    folder: Callable[[str], Path]
    device: torch.device
    dtype: torch.dtype
    rate: float
    repeats: int
    quick: bool
    limit: float = float("inf")
    timer: Callable[[], float] = time.perf_counter
    notes: list[str] = field(default_factory=list)
    loaded: tuple[str, Backbone] | None = None

    def backbone(self, model: str) -> Backbone:
        """The whole model, kept until another one is asked for."""
        if self.loaded is None or self.loaded[0] != model:
            self.loaded = None
            folder = self.folder(model)
            backbone = load_backbone(folder, dtype=self.dtype, device=self.device)
            self.loaded = (model, backbone)
        return self.loaded[1]
