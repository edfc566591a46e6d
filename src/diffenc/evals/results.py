"""Percentages over trials, and means."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Result:
    """A percentage over several trials.

    Attributes:
        trials: Percentage of each trial, 0 to 100.
        items: Number of items that each percentage is made from.
    """

    trials: tuple[float, ...]
    items: int

    @property
    def mean(self) -> float:
        """Mean over trials."""
        return mean(self.trials)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over trials (ddof 1); None for one trial."""
        if len(self.trials) < 2:
            return None
        return math.sqrt(sum((t - self.mean) ** 2 for t in self.trials) / (len(self.trials) - 1))

    @property
    def text(self) -> str:
        """Mean, and the deviation where there are several trials: ``"31.9 ± 2.7"``."""
        return percent(self.mean, self.std)

    @property
    def sampling_error(self) -> float:
        """Half of the 95 % interval from the number of items alone: 1.96 sqrt(p (1 - p) / n)."""
        share = self.mean / 100
        return 196 * math.sqrt(max(0.0, share * (1 - share)) / self.items)


def mean(values: Iterable[float]) -> float:
    """Mean of one number or more."""
    numbers = tuple(values)
    return sum(numbers) / len(numbers)


def percent(mean: float, deviation: float | None = None) -> str:
    """``"31.9 ± 2.7"``."""
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
