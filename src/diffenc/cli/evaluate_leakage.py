"""`diffenc evaluate leakage`: how much of a foreign prompt is said."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffenc.cli.evaluate_answers_command import asks_a_model
from diffenc.cli.evaluate_answers_options import (
    Annotations,
    CocoData,
    DataSeed,
    Limit,
    Metrics,
    Split,
    TokenizerOption,
)
from diffenc.cli.evaluate_answers_run import Asked
from diffenc.cli.evaluate_captions_data import caption_tokens, known_metrics, read_captions
from diffenc.cli.score_options import split_names
from diffenc.errors import ConfigError

if TYPE_CHECKING:
    from diffenc.evals.captioning import CaptionSet
    from diffenc.evals.leakage import LeakageSweep
    from diffenc.evals.saved_vlm import SavedVLM


_ExchangeSeed = Annotated[int, typer.Option(help="Of who gets whose caption.")]


@asks_a_model("leakage", prompts=None, seed=_ExchangeSeed)
def leakage(
    asked: Asked,
    data: CocoData,
    annotations: Annotations = None,
    split: Split = None,
    guidance_scale: Annotated[
        list[str] | None,
        typer.Option(
            metavar="S,S",
            help="Guidance of the features, with commas or repeated, a row each; default as "
            "the model was trained.",
        ),
    ] = None,
    metric: Metrics = None,
    tokenizer: TokenizerOption = "ptb",
    limit: Limit = None,
    data_seed: DataSeed = None,
) -> None:
    """Measure how much of a foreign prompt is said.

    The encoder reads captions of other pictures. The prompt readout is one number: 0 where it
    makes no difference which caption that is, 1 where every foreign word of it is said. It needs
    no metric.
    """
    from diffenc.evals.leakage import evaluate_leakage, leakage_table

    metrics, scales = known_metrics(metric, tokenizer), _scales(guidance_scale)
    model = asked.open_model(caption_tokens(data), prompts=None)
    for scale in scales:
        model.guided(scale)  # refused before anything is asked
    found_data = read_captions(data, annotations, split, limit, data_seed)
    options = {
        "seed": asked.seed,
        "metrics": metrics,
        "tokenizer": tokenizer,
        **asked.options,
    }
    rounds = [f"CFG={scale:g}, " for scale in scales] or [""]
    titles = [f"{each}{part}" for each in rounds for part in ("foreign captions", "control")]
    with asked.answers(*titles) as (file, progress):
        options |= {"results": file, "progress": progress}
        if scales:
            sweep = _sweep(model, found_data, scales, options)
            every = sweep.evaluations
            table, content = sweep.table(paper=asked.paper), _sweep_content(sweep)
        else:
            found = evaluate_leakage(found_data, model, **options)
            every = (found,)
            table, content = (
                leakage_table([(model.name, found)], paper=asked.paper),
                found.to_dict(),
            )
    asked.report(
        content,
        [table],
        list(dict.fromkeys(note for each in every for note in each.notes)),
        count=sum(2 * len(each.items) for each in every),
        fresh=sum(each.fresh for each in every),
        miniature=data == "shapes",
    )


def _sweep(
    model: "SavedVLM", data: "CaptionSet", scales: Sequence[float], options: dict[str, Any]
) -> "LeakageSweep":
    from diffenc.evals.leakage import Setting, sweep_leakage

    settings = [
        Setting(guidance_scale=scale, prompt_dropout=model.prompt_dropout) for scale in scales
    ]
    return sweep_leakage(
        data, lambda setting: model.guided(setting.guidance_scale), settings, **options
    )


def _sweep_content(sweep: "LeakageSweep") -> dict[str, Any]:
    pairs = zip(sweep.settings, sweep.evaluations, strict=True)
    return {
        "curve": sweep.curve(sweep.settings[0].prompt_dropout),
        "settings": [
            {"guidance_scale": setting.guidance_scale, **found.to_dict()}
            for setting, found in pairs
        ],
    }


def _scales(entries: list[str] | None) -> list[float]:
    """``["1,1.5", "7"]`` to ``[1.0, 1.5, 7.0]``."""
    found = []
    for entry in split_names(entries) or ():
        try:
            scale = float(entry)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise ConfigError(f"a guidance scale is a number, such as 1.5; got {entry!r}")
        found.append(scale)
    if entries and not found:
        raise ConfigError("--guidance-scale names no number; write it like 1,1.5,7")
    if len(set(found)) < len(found):
        raise ConfigError(f"guidance scales must stand once each, got {found}")
    return found
