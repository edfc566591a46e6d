"""Checks that every study makes before it begins, and the report of its progress."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from diffenc.errors import ConfigError

Progress: TypeAlias = Callable[[int, int], object]
"""Called with the number of scenes (or of rows of the U-Net) that are done and that of all."""


class Done:
    """Counter of the work that is done, which reports its progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        """Count finished work, and report the progress."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def require_distinct(what: str, values: Sequence[Any]) -> None:
    """Raise a `ConfigError` unless there are values, each once."""
    if not values or len(set(values)) != len(values):
        raise ConfigError(f"{what} must be one or more, each once, got {list(values)}")


def chance_of(labels: Sequence[int]) -> float:
    """Share of the most frequent answer: what is right without looking."""
    return max(Counter(labels).values()) / len(labels)
