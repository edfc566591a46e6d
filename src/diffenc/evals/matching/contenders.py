"""What is compared: scorers by their presets, with reference pictures, and CLIP baselines."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffenc.errors import ConfigError
from diffenc.evals.matching.base import Matcher, MatchingBenchmark
from diffenc.evals.matching.baselines import load_baseline
from diffenc.evals.matching.matchers import ScorerMatcher, scorer_matchers
from diffenc.evals.matching.miniature import REFERENCE_SEED, shapes_benchmark
from diffenc.evals.matching.options import MatchOptions
from diffenc.models.device import named_device, named_dtype
from diffenc.scorer import CrossAttnScorer
from diffenc.scoring.config import ScorerConfig, scorer_preset

if TYPE_CHECKING:
    from PIL.Image import Image


_DEFAULT = ("calibrated",)
_NO_SCORER = ("none",)
_LAYER_SETS = (("all",), ("discffusion",))


def load_matchers(
    benchmark: MatchingBenchmark, options: MatchOptions, *, by_timestep: bool = False
) -> list[Matcher]:
    """Scores of one model by each preset, then the CLIP baselines.

    Args:
        benchmark: Benchmark that gives reference pictures if the options ask for them; for a
            miniature they come from another seed.
        options: Models, presets, and how scores are made.
        by_timestep: Whether scores are given for each timestep.

    Raises:
        DiffencError: A model cannot be loaded, or an option is not allowed.
    """
    presets = () if options.presets == _NO_SCORER else options.presets or _DEFAULT
    clip = options.clip or ()
    if not presets and not clip:
        raise ConfigError("there is nothing to score with: --preset none needs --clip")
    device, dtype = named_device(options.device), named_dtype(options.dtype)
    matchers: list[Matcher] = []
    if presets:
        changed = _changed_fields(options)
        readers = [name for name in presets if _reads_attention(name)]
        if "layers" in changed and not readers:
            raise ConfigError(
                f"--layers belongs to scores by attention, and {' and '.join(presets)} read none; "
                "leave it out, or add --preset calibrated"
            )
        first = (*readers, *presets)[0].partition("+")[0]
        scorer = CrossAttnScorer.from_pretrained(
            options.model,
            device=device,
            dtype=dtype,
            preset="paper" if readers else first,  # a model may have no cross-attention
            **changed,
        )
        changed = {name: getattr(scorer.config, name) for name in changed}
        rows = scorer_matchers(scorer, presets, changed, by_timestep=by_timestep)
        pictures: list[Image | Path] = list(options.references or ())
        pictures += _pictures_of(benchmark, options.data_references)
        matchers += _calibrated(rows, pictures)
    matchers += [load_baseline(name, device=device, dtype=dtype) for name in clip]
    return matchers


def _reads_attention(spec: str) -> bool:
    return ScorerConfig.from_dict(scorer_preset(spec.partition("+")[0])).attention


def _changed_fields(options: MatchOptions) -> dict[str, Any]:
    """Fields of `ScorerConfig` that replace those of every preset."""
    layers: Any = options.layers
    fields = {
        "timesteps": options.timesteps,
        "layers": layers[0] if layers in _LAYER_SETS else layers,
        "size": options.size,
        "resize": options.resize,
        "batch_size": options.batch_size,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _calibrated(
    matchers: Sequence[ScorerMatcher], pictures: "Sequence[Image | Path]"
) -> list[ScorerMatcher]:
    """The matchers, those that calibrate by these pictures where there are any."""
    if not pictures:
        return list(matchers)
    calibrated = []
    for matcher in matchers:
        if matcher.scorer.config.calibration is None:
            calibrated.append(matcher)
            continue
        matcher.scorer.calibrate(list(pictures))
        # anew, since it describes the scorer as it was when it was made
        again = ScorerMatcher(matcher.scorer, name=matcher.name, by_timestep=matcher.by_timestep)
        calibrated.append(again)
    if not any(matcher.scorer.config.calibration for matcher in calibrated):
        raise ConfigError("reference pictures go with a preset that calibrates: calibrated")
    return calibrated


def _pictures_of(benchmark: MatchingBenchmark, count: int | None) -> "list[Image]":
    """Some pictures of the data, spread over its items."""
    if count is None:
        return []
    if not benchmark.published:
        benchmark = shapes_benchmark(benchmark.name, per_label=count, seed=REFERENCE_SEED)
    every = [picture for item in benchmark.items for picture in item.pictures]
    step = max(1, len(every) // count)
    return [picture.open() for picture in every[::step][:count]]
