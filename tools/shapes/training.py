"""What all training scripts of the miniature models share: schedules, averages, logs, resuming."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

HELD_OUT_SEED = 900_000
"""Scenes with this seed and above are for the cards' tables; nothing is chosen by them."""
VALIDATION_SEED = 800_000
"""Scenes with this seed are for looking at while training; no model is trained on them."""


class _FloatAttention(TorchFunctionMode):
    """Attention in float32: going back through it in bfloat16 takes a CPU five times as long."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            query, key, value = (states.float() for states in args[:3])
            return func(query, key, value, *args[3:], **(kwargs or {}))


@contextmanager
def mixed_precision() -> Iterator[None]:
    """Products of matrices in bfloat16, for CPUs that have units for them."""
    with torch.autocast("cpu", dtype=torch.bfloat16), _FloatAttention():
        yield


class Run:
    """A resumable training run in a folder: state, exponential moving average, log.

    The state is written to a new file and renamed, so that a kill at any moment leaves a whole one.
    """

    def __init__(
        self,
        folder: Path,
        modules: dict[str, nn.Module],
        *,
        steps: int,
        lr: float,
        warmup: int = 100,
        ema_decay: float = 0.999,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        self.folder, self.modules = folder, nn.ModuleDict(modules)
        self.steps, self.lr, self.warmup, self.ema_decay = steps, lr, warmup, ema_decay
        self.step, self.seconds = 0, 0.0
        self._parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._parameters, lr=lr, betas=betas, weight_decay=weight_decay
        )
        self.ema = [p.detach().clone() for p in self._parameters]
        self._started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        if self._state_file.exists():
            self._resume()

    @property
    def _state_file(self) -> Path:
        return self.folder / "state.pt"

    def _resume(self) -> None:
        state = torch.load(self._state_file, weights_only=True)
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema = state["ema"]
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"resumed {self.folder} at step {self.step}", flush=True)

    def save(self) -> None:
        """Write the whole state."""
        now = time.monotonic()
        self.seconds += now - self._started
        self._started = now
        state = {
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self._state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._state_file)

    def update(self, loss: Tensor) -> None:
        """One optimizer step at the scheduled rate, and the average after it."""
        rate = self.lr * min(1.0, (self.step + 1) / self.warmup)
        rate *= 0.5 + 0.5 * math.cos(math.pi * min(1.0, self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = max(rate, self.lr * 0.02)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self._parameters], 1 - decay)

    def swap_average(self) -> None:
        """Exchange weights and averaged weights; a second call exchanges them back."""
        for parameter, average in zip(self._parameters, self.ema, strict=True):
            kept = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(kept)

    def log(self, **values: Any) -> None:
        """Append a line to the log and print it."""
        elapsed = round(self.seconds + time.monotonic() - self._started)
        record = {"step": self.step, "seconds": elapsed, **values}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
