"""Rows of a scoring call in batches that fit into memory, and a check of what they give."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from diffenc.errors import NonFiniteError
from diffenc.models.base import Backbone

_Row = TypeVar("_Row")
_Result = TypeVar("_Result")


def in_batches(
    rows: Sequence[_Row], batch_size: int, run: Callable[[Sequence[_Row]], _Result]
) -> Iterator[tuple[Sequence[_Row], _Result]]:
    """Rows in parts of at most `batch_size`, with what `run` makes of each.

    On CUDA a part that runs out of memory is repeated in halves, with one warning at the end.
    """
    size, start = batch_size, 0
    while start < len(rows):
        part = rows[start : start + size]
        try:
            result = run(part)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            size = (min(size, len(part)) + 1) // 2
            torch.cuda.empty_cache()
            continue
        yield part, result
        start += len(part)
    if size < batch_size:
        warnings.warn(
            f"calls of the denoiser with {batch_size} rows did not fit and were cut down to "
            f"{size}. Pass batch_size={size} to begin there.",
            stacklevel=2,
        )


def check_scores(scores: Tensor, backbone: Backbone) -> None:
    """Raise a `NonFiniteError` unless all scores are numbers."""
    if not torch.isfinite(scores).all():
        raise NonFiniteError(
            f"scores hold NaN or infinity with a {backbone.denoiser_word} in {backbone.dtype}; "
            "load the model with dtype=torch.bfloat16 or torch.float32, and check its weights if "
            "that is so already"
        )
