"""A host's code run up to its first call of a tower, to see what it shows there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _Stop(BaseException):
    """Leaves the host's code; no `except Exception` of a host holds it."""


@dataclass(slots=True)
class FirstCall:
    """What a host shows to its tower first.

    Attributes:
        shown: Pictures (n 3 height width) in the host's order; None as long as no tower was called.
    """

    shown: Tensor | None = None

    def run(self, code: Callable[[], Any]) -> None:
        """Run a host's code until it calls a tower, or to its end."""
        with suppress(_Stop):
            code()

    def stop_at(self, images: "Tensor | Sequence[Tensor]") -> None:
        """Note the pictures of a tower's call, and leave the host's code."""
        parts = [images] if isinstance(images, Tensor) else list(images)
        if parts:
            stacks = [part[None] if part.ndim == 3 else part for part in parts]
            device = stacks[0].device
            self.shown = torch.cat([stack.to(device, torch.float32) for stack in stacks])
        raise _Stop


_FIRST: ContextVar[FirstCall | None] = ContextVar("diffenc_first_call", default=None)


@contextmanager
def recording_first_call() -> Iterator[FirstCall]:
    """A block in which a tower's first call is noted, and ends the host's code."""
    call = FirstCall()
    token = _FIRST.set(call)
    try:
        yield call
    finally:
        _FIRST.reset(token)


def first_call_to_record() -> FirstCall | None:
    """The record that a tower's call belongs to, or None: then the tower computes."""
    return _FIRST.get()
