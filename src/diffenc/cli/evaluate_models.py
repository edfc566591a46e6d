"""The models of `diffenc evaluate`: scorers by their presets, with reference pictures, and CLIP."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffenc.cli.options import quiet_libraries, to_device, to_dtype
from diffenc.cli.score_options import load_scorer
from diffenc.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffenc.evals.matching.base import Matcher, MatchingBenchmark
    from diffenc.evals.matching.matchers import ScorerMatcher


def load_matchers(
    benchmark: "MatchingBenchmark",
    specs: list[str],
    clip: list[str],
    *,
    by_timestep: bool,
    model: str,
    device: str,
    dtype: str,
    references: list[Path] | None,
    data_references: int | None,
    **options: Any,
) -> "list[Matcher]":
    """Scores of one model by each preset, then the baselines.

    Args:
        benchmark: Benchmark that gives reference pictures if `data_references` is given; for a
            miniature they come from another seed.
        specs: Names of presets, see `scorer_matchers`; an empty list loads no scorer.
        clip: Names or folders of CLIP models that serve as baselines.
        by_timestep: Whether scores are given for each timestep.
        model: Name or folder of the diffusion model that gives the scores.
        device: Name of the device that the models run on.
        dtype: Name of the floating point type of the weights.
        references: Paths of the user's own reference pictures; None: not given.
        data_references: Number of reference pictures from the data, spread over its items; None
            takes none.
        options: Fields of the scorer's config as the command line has them; None: not given.

    Raises:
        DiffencError: A model cannot be loaded, or an option is not allowed.
    """
    quiet_libraries()
    from diffenc.evals.matching.clip import ClipMatcher
    from diffenc.evals.matching.matchers import scorer_matchers

    made: list[Matcher] = []
    if specs:
        scorer = load_scorer(model, device=device, dtype=dtype, preset="paper", **options)
        rows = scorer_matchers(
            scorer, specs, _changed(scorer.config, options), by_timestep=by_timestep
        )
        made += _calibrated(rows, _references(benchmark, data_references, references))
    where, kind = to_device(device), to_dtype(dtype)
    made += [ClipMatcher.from_pretrained(each, device=where, dtype=kind) for each in clip]
    return made


def _changed(config: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options that the command line set, as the loaded config has them, for every preset."""
    return {name: getattr(config, name) for name, value in options.items() if value is not None}


def _calibrated(
    matchers: "Sequence[ScorerMatcher]", pictures: "list[Image | Path]"
) -> "list[ScorerMatcher]":
    """The matchers, those that calibrate by these pictures where there are any."""
    from diffenc.evals.matching.matchers import ScorerMatcher

    if not pictures:
        return list(matchers)
    made = []
    for matcher in matchers:
        if matcher.scorer.config.calibration is None:
            made.append(matcher)
            continue
        matcher.scorer.calibrate(pictures)
        # anew, since it describes the scorer as it was when it was made
        again = ScorerMatcher(matcher.scorer, name=matcher.name, by_timestep=matcher.by_timestep)
        made.append(again)
    if not any(matcher.scorer.config.calibration for matcher in made):
        raise ConfigError("reference pictures go with a preset that calibrates: calibrated")
    return made


def _references(
    benchmark: "MatchingBenchmark", count: int | None, given: Sequence[Path] | None
) -> "list[Image | Path]":
    """Reference pictures: the user's, and some of the data spread over its items."""
    pictures: list[Image | Path] = list(given or ())
    if count is None:
        return pictures
    from diffenc.evals.matching.miniature import REFERENCE_SEED, shapes_benchmark

    if benchmark.expected is None:
        benchmark = shapes_benchmark(benchmark.name, per_label=count, seed=REFERENCE_SEED)
    every = [picture for item in benchmark.items for picture in item.pictures]
    step = max(1, len(every) // count)
    return pictures + [picture.open() for picture in every[::step][:count]]
