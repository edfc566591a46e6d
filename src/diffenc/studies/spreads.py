"""Figures of a study: one number per seed, compared within each seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TypeVar

from diffenc.errors import NonFiniteError

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Spread:
    """One number per seed.

    Differences are taken within each seed. A format specification applies to the mean and to the
    deviation, so that ``f"{spread:+.2f}"`` is ``"+0.12 ± 0.03"``.

    Attributes:
        values: Numbers in the order of the seeds.

    Raises:
        NonFiniteError: There is none, or one is NaN or infinity.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        # NaN is neither above nor below anything: whatever it is compared with would seem decided.
        if not self.values or not all(map(math.isfinite, self.values)):
            raise NonFiniteError(f"figures must be finite, one per seed, got {self.values}")

    def __sub__(self, other: "Spread") -> "Spread":
        pairs = zip(self.values, other.values, strict=True)
        return Spread(tuple(first - second for first, second in pairs))

    def __format__(self, spec: str) -> str:
        deviation = self.deviation
        after = "" if deviation is None else f" ± {format(deviation, spec.removeprefix('+'))}"
        return f"{format(self.mean, spec)}{after}"

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None for a single seed."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def percent(self) -> "Spread":
        """The same for shares of 1 that are written in percent."""
        return Spread(tuple(100 * value for value in self.values))

    @property
    def won(self) -> str:
        """Number of seeds with a value above 0, as ``"2 of 3"``."""
        return f"{sum(value > 0 for value in self.values)} of {len(self.values)}"


def mean_of(spreads: Sequence[Spread]) -> Spread:
    """Mean of several figures within each seed."""
    seeds = zip(*(spread.values for spread in spreads), strict=True)
    return Spread(tuple(mean(values) for values in seeds))


def over_seeds(figures: Sequence[Mapping[Key, float]]) -> dict[Key, Spread]:
    """Spread of each figure over seeds.

    Args:
        figures: Figures of each seed; all seeds have the same ones.
    """
    return {key: Spread(tuple(each[key] for each in figures)) for key in figures[0]}


def written(spread: Spread | None, spec: str, *, nothing: str = "") -> str:
    """Mean and deviation by a format specification; `nothing` where there is no figure."""
    return nothing if spread is None else format(spread, spec)
