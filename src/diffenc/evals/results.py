"""Percentages over trials, means, and when answers decide nothing."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

MOST_UNREAD = 0.2
"""Largest share of answers that cannot be read beside which a number is one."""


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


def not_measured(unread: float) -> str | None:
    """Why a number is none, as in "not measured: 43 % of answers unread"; None where it is one.

    Answers that cannot be read count as wrong. Where they are many, a number says how a model words
    its answers, and not whether they are right.

    Args:
        unread: Share of the answers that cannot be read, 0 to 1.
    """
    if unread <= MOST_UNREAD:
        return None
    return f"not measured: {100 * unread:.3g} % of answers unread"


def percent(mean: float, deviation: float | None = None) -> str:
    """``"31.9 ± 2.7"``."""
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
