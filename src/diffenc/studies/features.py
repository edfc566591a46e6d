"""What features carry, by place in the U-Net, noise level and text."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc.config import EncoderConfig, check_choice
from diffenc.encoder import DiffusionEncoder
from diffenc.models import TapInfo, describe, match_taps
from diffenc.models.base import Backbone
from diffenc.studies.focus import read_focus
from diffenc.studies.readouts import fit_readout
from diffenc.studies.results import (
    CONDITIONINGS,
    Conditioning,
    FeatureStudy,
    Focus,
    Reading,
    Spread,
)
from diffenc.studies.settings import (
    Done,
    Progress,
    chance_of,
    require_distinct,
    require_least,
)
from diffenc.studies.trials import CLASSES, PROPERTIES, Property, Trial, sample_trials
from diffenc.studies.vectors import Place, gather

TIMESTEPS = (10, 50, 261, 500, 800)
"""Default timesteps, from nearly clean to nearly noise; GDF reads at 50, DIFT at 261."""

_BLOCKS = ("conv_in", "down_blocks.*", "mid_block", "up_blocks.*")
_STAGES = ("conv_in", "down_blocks", "mid_block", "up_blocks")


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

    Example:
        >>> study = study_features(scenes=60, seeds=1, timesteps=[50], focus_scenes=0)
        >>> study.best("color", "uncond").accuracy.mean > study.chance["color"]
        True

    Source:
        Linear probes as measure of what a layer holds: Alain and Bengio 2016, arXiv:1610.01644.
    """
    _check(timesteps, conditionings, scenes, focus_scenes, seeds, batch_size)
    chosen = tap_order(_known_taps(model), taps, _default_taps(model))
    steps = tuple(sorted(timesteps))
    config = EncoderConfig(taps=chosen, timestep=steps, size=size, batch_size=batch_size)
    encoder = (
        DiffusionEncoder(model, config)
        if isinstance(model, Backbone)
        else DiffusionEncoder.from_pretrained(model, device=device, dtype=dtype, **config.to_dict())
    )
    done = Done(progress, seeds * (scenes + focus_scenes))
    found: dict[Place, list[float]] = {}
    chances: list[dict[Property, float]] = []
    focus_of_seeds: list[list[Focus]] = []
    for seed in range(seeds):
        seeded = DiffusionEncoder(encoder.backbone, replace(config, seed=seed))
        trials = sample_trials(scenes, seed=seed)
        vectors = gather(seeded, trials, conditionings, done=done.add)
        split = 2 * scenes // 3
        for place, rows in vectors.items():
            found.setdefault(place, []).append(_accuracy(rows, trials, place[0], split))
        chances.append(
            {name: chance_of([t.label(name) for t in trials[split:]]) for name in PROPERTIES}
        )
        if focus_scenes:
            pairs = sample_trials(focus_scenes, seed=seed, least=2)
            focus_of_seeds.append(read_focus(seeded, pairs, done=done.add))
        seeded.clear_cache()
    return FeatureStudy(
        model=encoder.backbone.name,
        taps=chosen,
        timesteps=steps,
        readings=tuple(Reading(*place, Spread(tuple(each))) for place, each in found.items()),
        focus=_joined_focus(focus_of_seeds),
        chance={name: mean(chance[name] for chance in chances) for name in PROPERTIES},
        settings={
            "scenes": scenes,
            "focus_scenes": focus_scenes,
            "seeds": seeds,
            "size": size or encoder.backbone.default_size,
            "dtype": str(encoder.dtype).removeprefix("torch."),
        },
    )


def tap_order(
    known: Sequence[TapInfo], wanted: Sequence[str] | None, default: Sequence[str]
) -> tuple[str, ...]:
    """Taps from the input of the U-Net to its output; what lies inside a block, before the block.

    Args:
        known: All taps of the model.
        wanted: Module paths or globs of the taps to order; None is the blocks and `default`.
        default: Default taps of the model.

    Raises:
        TapError: A tap does not exist.
    """
    index = {tap.name: place for place, tap in enumerate(known)}
    patterns = [*_BLOCKS, *default] if wanted is None else wanted

    def place(name: str) -> tuple[int, int, bool, int]:
        stage, *rest = name.split(".")
        numbered = bool(rest) and rest[0].isdecimal()
        block = int(rest[0]) if numbered else 0
        return _STAGES.index(stage), block, len(rest) == numbered, index[name]

    return tuple(sorted((tap.name for tap in match_taps(patterns, known)), key=place))


def _accuracy(
    rows: Float[Tensor, "n c"], trials: Sequence[Trial], name: Property, split: int
) -> float:
    labels = torch.tensor([trial.label(name) for trial in trials], dtype=torch.long, device="cpu")
    readout = fit_readout(rows[:split], labels[:split], CLASSES[name])
    return readout.accuracy(rows[split:], labels[split:])


def _joined_focus(of_seeds: Sequence[Sequence[Focus]]) -> tuple[Focus, ...]:
    """One entry with a value per seed for each place that all seeds have."""
    places: dict[tuple[str, str, int], list[Focus]] = {}
    for entry in (entry for entries in of_seeds for entry in entries):
        places.setdefault((entry.measure, entry.tap, entry.timestep), []).append(entry)
    joined = []
    for entries in places.values():
        if len(entries) == len(of_seeds):
            asked, control, preferred = (
                Spread(tuple(value for entry in entries for value in getattr(entry, part).values))
                for part in ("asked", "control", "preferred")
            )
            joined.append(replace(entries[0], asked=asked, control=control, preferred=preferred))
    return tuple(joined)


def _known_taps(model: "str | Backbone") -> tuple[TapInfo, ...]:
    return model.taps() if isinstance(model, Backbone) else describe(model).taps()


def _default_taps(model: "str | Backbone") -> tuple[str, ...]:
    return model.default_taps if isinstance(model, Backbone) else describe(model).default_taps


def _check(
    timesteps: Sequence[int],
    conditionings: Sequence[str],
    scenes: int,
    focus_scenes: int,
    seeds: int,
    batch_size: int,
) -> None:
    require_least(
        {
            "scenes": (scenes, 30),
            "focus_scenes": (focus_scenes, 0),
            "seeds": (seeds, 1),
            "batch_size": (batch_size, 1),
        }
    )
    for name in conditionings:
        check_choice("conditionings", name, CONDITIONINGS)
    require_distinct("timesteps", timesteps)
    require_distinct("conditionings", conditionings)
