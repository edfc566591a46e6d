"""What features carry, by place in the U-Net, noise level and text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffenc.checks.arguments import whole
from diffenc.config import check_choice
from diffenc.models.base import Backbone
from diffenc.studies.focus import Focus, Measure, read_focus
from diffenc.studies.probes import (
    Done,
    Place,
    ProbeStudy,
    Progress,
    gather,
    held_out_accuracies,
    held_out_chances,
    numerics,
    open_encoder,
    require_distinct,
    with_seed,
)
from diffenc.studies.spreads import Spread, mean_of, over_seeds
from diffenc.studies.trials import (
    CONDITIONINGS,
    PROPERTIES,
    Conditioning,
    Property,
    sample_trials,
)

TIMESTEPS = (10, 50, 261, 500, 800)
"""Default timesteps, from nearly clean to nearly noise; GDF reads at 50, DIFT at 261."""


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
class FeatureStudy(ProbeStudy):
    """Results of the study.

    Attributes:
        readings: Accuracy of each property, text, tap and timestep.
        focus: Effect of a text at each measure, tap and timestep where it can have one.
        chance: Share of the most frequent answer among the test scenes, for each property, 0 to 1,
            mean over seeds.
        settings: Settings of the run: numbers of scenes and seeds, picture size and dtype.
    """

    readings: tuple[Reading, ...]
    focus: tuple[Focus, ...]
    chance: dict[Property, float]
    settings: dict[str, Any]

    def find(
        self, name: Property, conditioning: Conditioning | None, tap: str, timestep: int | None
    ) -> Spread | None:
        """Accuracy at one place; None where it was not read."""
        for reading in self.select(name, conditioning):
            if (reading.tap, reading.timestep) == (tap, timestep):
                return reading.accuracy
        return None

    def select(self, name: Property, conditioning: Conditioning | None) -> Iterator[Reading]:
        """Readings of a property under a text, at all places."""
        for reading in self.readings:
            if (reading.property, reading.conditioning) == (name, conditioning):
                yield reading

    def best(self, name: Property, conditioning: Conditioning) -> Reading | None:
        """The place from which a property is read best; None if that was not studied."""
        readings = self.select(name, conditioning)
        return max(readings, key=lambda reading: reading.accuracy.mean, default=None)

    def gain(self, name: Property, conditioning: Conditioning) -> Spread | None:
        """Accuracy under a text minus that without, mean over taps and timesteps, per seed."""
        gains = [
            reading.accuracy - base
            for reading in self.select(name, conditioning)
            if (base := self.find(name, "uncond", reading.tap, reading.timestep)) is not None
        ]
        return mean_of(gains) if gains else None

    def focus_at(self, measure: Measure, tap: str, timestep: int) -> Focus | None:
        """Focus at one place; None where no text has an effect."""
        for entry in self.focus:
            if (entry.measure, entry.tap, entry.timestep) == (measure, tap, timestep):
                return entry
        return None

    @property
    def conditionings(self) -> tuple[Conditioning, ...]:
        """Kinds of text that were studied."""
        studied = {reading.conditioning for reading in self.readings}
        return tuple(name for name in CONDITIONINGS if name in studied)

    @property
    def properties(self) -> tuple[Property, ...]:
        """Properties that were studied."""
        studied = {reading.property for reading in self.readings}
        return tuple(name for name in PROPERTIES if name in studied)


def study_features(
    model: "str | Backbone" = "shapes",
    *,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[int] = TIMESTEPS,
    conditionings: Sequence[Conditioning] = CONDITIONINGS,
    scenes: int = 240,
    focus_scenes: int = 60,
    seeds: int = 3,
    size: int | None = None,
    batch_size: int = 48,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> FeatureStudy:
    """Read colour, shape, position and count from frozen features, and where a text acts.

    Held-out scenes of the miniature world are encoded without a text, under a question after the
    property that does not give it away, and under a caption that does (but for positions). Colour,
    shape and position are read from the mean feature over the cells of one object, the number of
    objects from the mean over all cells; each by a linear layer in closed form, fitted to two
    thirds of the scenes and measured on the rest. See `diffenc.studies.focus` for where a text
    acts. One pass of the U-Net per scene, timestep and text reads every tap.

    Args:
        model: Alias, Hub id or folder of a diffusion model, or a loaded `Backbone`.
        taps: Module paths or globs of the places to read; None takes the blocks and the backbone's
            default taps.
        timesteps: Scheduler steps of the noise levels, each 0 to 999.
        conditionings: Kinds of text to read under, some of "uncond", "question" and "caption".
        scenes: Number of scenes per seed for the readouts, 30 or more.
        focus_scenes: Number of scenes per seed, with two objects or more, that show where a text
            acts; 0 leaves this part out.
        seeds: Number of repetitions, each with other scenes and other noise.
        size: Side of the pictures in pixels; None is the backbone's own.
        batch_size: Number of rows (scenes x timesteps) per call of the U-Net; one scene's rows are
            never split.
        device: Device that the model runs on; unused for a `Backbone`.
        dtype: Floating point type of the U-Net; unused for a `Backbone`.
        progress: Function that is called after each batch with the number of scenes that are done
            and the number of all scenes; None reports nothing.

    Raises:
        ConfigError: A number is too small, or a word or a timestep is unknown or stands twice.
        BackboneError: The model is unknown, missing or broken.
        TapError: A tap does not exist in this model.

    Examples:
        >>> study = study_features(scenes=60, seeds=1, timesteps=[50], focus_scenes=0)
        >>> study.best("color", "uncond").accuracy.mean > study.chance["color"]
        True

    Source:
        Linear probes as measure of what a layer holds: Alain and Bengio 2016, arXiv:1610.01644.
    """
    whole("scenes", scenes, least=30)
    whole("focus_scenes", focus_scenes, least=0)
    whole("seeds", seeds, least=1)
    for name in conditionings:
        check_choice("conditionings", name, CONDITIONINGS)
    require_distinct("conditionings", conditionings)
    encoder = open_encoder(
        model,
        taps=taps,
        timesteps=timesteps,
        size=size,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    done = Done(progress, seeds * (scenes + focus_scenes))
    accuracies: list[dict[Place, float]] = []
    chances: list[dict[Property, float]] = []
    focus: list[list[Focus]] = []
    for seed in range(seeds):
        seeded = with_seed(encoder, seed)
        trials = sample_trials(scenes, seed=seed)
        labels = {name: [trial.label(name) for trial in trials] for name in PROPERTIES}
        vectors = gather(seeded, trials, conditionings, done=done.add)
        accuracies.append(held_out_accuracies(vectors, labels))
        chances.append(held_out_chances(labels))
        if focus_scenes:
            pairs = sample_trials(focus_scenes, seed=seed, least=2)
            focus.append(read_focus(seeded, pairs, done=done.add))
        seeded.clear_cache()
    return FeatureStudy(
        model=encoder.backbone.name,
        taps=encoder.config.taps or (),
        timesteps=encoder.config.timesteps,
        readings=tuple(Reading(*place, each) for place, each in over_seeds(accuracies).items()),
        focus=_joined(focus),
        chance={name: each.mean for name, each in over_seeds(chances).items()},
        settings={
            "scenes": scenes,
            "focus_scenes": focus_scenes,
            "seeds": seeds,
            **numerics(encoder),
        },
    )


def _joined(seeds: Sequence[Sequence[Focus]]) -> tuple[Focus, ...]:
    """One entry with a value per seed for each place that all seeds have."""
    tables = [{(each.measure, each.tap, each.timestep): each for each in one} for one in seeds]
    joined = []
    for place, first in tables[0].items() if tables else ():
        entries = [table[place] for table in tables if place in table]
        if len(entries) == len(tables):
            asked, control, preferred = (
                Spread(tuple(value for entry in entries for value in getattr(entry, part).values))
                for part in ("asked", "control", "preferred")
            )
            joined.append(replace(first, asked=asked, control=control, preferred=preferred))
    return tuple(joined)
