"""Results of the study of features, as plain values."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any, Literal, get_args

from diffenc.errors import NonFiniteError
from diffenc.studies.trials import PROPERTIES, Property

Conditioning = Literal["uncond", "question", "caption"]
CONDITIONINGS: tuple[Conditioning, ...] = get_args(Conditioning)

Measure = Literal["attention", "change"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True, slots=True)
class Spread:
    """One number per seed.

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

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None for a single seed."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True, slots=True)
class Reading:
    """Accuracy of reading a property from one place.

    Attributes:
        property: Name of the property that is read.
        conditioning: Kind of text that the features were made under; None for pixels and latents,
            which depend on no text.
        tap: Place in the U-Net, as a module path; "pixels" and "latents" are its input.
        timestep: Scheduler step of the noise level; None for pixels and latents.
        accuracy: Accuracy on scenes that the readout was not fitted to, 0 to 1.
    """

    property: Property
    conditioning: Conditioning | None
    tap: str
    timestep: int | None
    accuracy: Spread


@dataclass(frozen=True, slots=True)
class Focus:
    """How much more a text acts inside the object that it names than elsewhere.

    Attributes:
        measure: Quantity that is measured. "attention": density of the words' cross-attention
            inside the object's mask over its mean density in the picture. "change": mean |f_c -
            f_u| inside over that outside.
        tap: Place in the U-Net, as a module path.
        timestep: Scheduler step of the noise level.
        asked: Value for the object that the text names, as a geometric mean over scenes; 1 is no
            preference.
        control: Value inside the same masks under a text that names another object of the scene.
        preferred: Share of scenes in which `asked` is above `control`, 0 to 1; 0.5 is chance.
    """

    measure: Measure
    tap: str
    timestep: int
    asked: Spread
    control: Spread
    preferred: Spread


@dataclass(frozen=True, slots=True)
class FeatureStudy:
    """Results of the study.

    Attributes:
        model: Name of the backbone.
        taps: Places in the U-Net, in the order in which they run.
        timesteps: Scheduler steps of the noise levels, in rising order.
        readings: Accuracy of each property, text, tap and timestep.
        focus: Effect of a text at each measure, tap and timestep where it can have one.
        chance: Share of the most frequent answer among the test scenes, for each property, 0 to 1,
            mean over seeds.
        settings: Settings of the run: numbers of scenes and seeds, picture size and dtype.
    """

    model: str
    taps: tuple[str, ...]
    timesteps: tuple[int, ...]
    readings: tuple[Reading, ...]
    focus: tuple[Focus, ...]
    chance: dict[Property, float]
    settings: dict[str, Any]

    def find(
        self, wanted: Property, conditioning: Conditioning | None, tap: str, timestep: int | None
    ) -> Spread | None:
        """Accuracy at one place; None where it was not read."""
        for reading in self.select(wanted, conditioning):
            if (reading.tap, reading.timestep) == (tap, timestep):
                return reading.accuracy
        return None

    def select(self, wanted: Property, conditioning: Conditioning | None) -> Iterator[Reading]:
        """Readings of a property under a text, at all places."""
        for reading in self.readings:
            if (reading.property, reading.conditioning) == (wanted, conditioning):
                yield reading

    def best(self, wanted: Property, conditioning: Conditioning) -> Reading | None:
        """The place from which a property is read best; None if that was not studied."""
        found = list(self.select(wanted, conditioning))
        return max(found, key=lambda reading: reading.accuracy.mean) if found else None

    def gain(self, wanted: Property, conditioning: Conditioning) -> Spread | None:
        """Accuracy under a text minus that without, mean over taps and timesteps, per seed."""
        differences: list[Sequence[float]] = []
        for reading in self.select(wanted, conditioning):
            base = self.find(wanted, "uncond", reading.tap, reading.timestep)
            if base is not None:
                pairs = zip(reading.accuracy.values, base.values, strict=True)
                differences.append([with_text - without for with_text, without in pairs])
        if not differences:
            return None
        return Spread(tuple(mean(of_seed) for of_seed in zip(*differences, strict=True)))

    def focus_at(self, measure: Measure, tap: str, timestep: int) -> Focus | None:
        """Focus at one place; None where no text has an effect."""
        for entry in self.focus:
            if (entry.measure, entry.tap, entry.timestep) == (measure, tap, timestep):
                return entry
        return None

    @property
    def conditionings(self) -> tuple[Conditioning, ...]:
        """Kinds of text that were studied."""
        found = {reading.conditioning for reading in self.readings}
        return tuple(name for name in CONDITIONINGS if name in found)

    @property
    def properties(self) -> tuple[Property, ...]:
        """Properties that were studied."""
        found = {reading.property for reading in self.readings}
        return tuple(name for name in PROPERTIES if name in found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)
