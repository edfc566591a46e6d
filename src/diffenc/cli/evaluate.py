"""`diffenc evaluate`: benchmarks of scores and of models that answer, and two studies."""

import json
from typing import Any

import typer

from diffenc.cli.evaluate_captions import captions
from diffenc.cli.evaluate_choices import blink, mmvp
from diffenc.cli.evaluate_leakage import leakage
from diffenc.cli.evaluate_llava_bench import llava_bench
from diffenc.cli.evaluate_options import (
    Anew,
    Clip,
    Data,
    DataReferences,
    DataSeed,
    FirstSeed,
    Limit,
    Output,
    Paper,
    PerLabel,
    Presets,
    Template,
    TimestepsOption,
    Trials,
)
from diffenc.cli.evaluate_run import (
    given_options,
    print_tables,
    run_command,
    say_where,
    write_report,
)
from diffenc.cli.evaluate_studies import draws_study, timesteps_study
from diffenc.cli.noted import NotedCommand, command_line, command_name
from diffenc.cli.options import Debug, Device, Dtype, Model, SkipBroken
from diffenc.cli.score_options import AsJson, BatchSize, Layers, References, ResizeOption, Size
from diffenc.errors import ConfigError

evaluate = typer.Typer(help="Benchmarks of image-text matching, and of models that answer.")


def _benchmark(
    data: Data,
    model: Model = "shapes",
    presets: Presets = None,
    clip: Clip = None,
    trials: Trials = 3,
    seed: FirstSeed = 0,
    timesteps: TimestepsOption = None,
    layers: Layers = None,
    size: Size = None,
    resize: ResizeOption = None,
    references: References = None,
    data_references: DataReferences = None,
    template: Template = None,
    limit: Limit = None,
    per_label: PerLabel = None,
    data_seed: DataSeed = None,
    skip_broken: SkipBroken = False,
    output: Output = None,
    paper: Paper = None,
    batch_size: BatchSize = 16,
    as_json: AsJson = False,
    force: Anew = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    _debug: Debug = False,
) -> None:
    """Score a benchmark, the one that the command is named after."""
    given = given_options(locals())
    _evaluate(command_name(), **given)


def _evaluate(
    name: str,
    *,
    presets: list[str] | None,
    clip: list[str] | None,
    paper: bool | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Evaluate, write the report and print it."""
    from diffenc.evals.matching.report import remarks, tables, to_dict, to_markdown

    specs = [] if presets == ["none"] else presets or ["calibrated"]
    if not specs and not clip:
        raise ConfigError("there is nothing to score with: --preset none needs --clip")
    files = ("report.md", "report.json")
    found, folder = run_command(name, specs, clip or [], files, by_timestep=False, **given)
    content = to_dict(found)
    page = to_markdown(found, command=command_line(), paper=paper)
    written = write_report(folder, "report", page, content)
    if as_json:
        typer.echo(json.dumps(content, indent=1, ensure_ascii=False))
        return
    print_tables(tables(found, paper=paper), remarks(found))
    say_where(found, [folder / "scores.jsonl", *written])


evaluate.command(
    "winoground",
    cls=NotedCommand,
    help="Score pictures and captions of the same words.",
)(_benchmark)
evaluate.command(
    "mmvp-vlm",
    cls=NotedCommand,
    help="Score pairs of near-same pictures by pattern.",
)(_benchmark)
evaluate.command("timesteps", cls=NotedCommand)(timesteps_study)
evaluate.command("draws", cls=NotedCommand)(draws_study)
evaluate.command()(captions)
evaluate.command()(leakage)
evaluate.command()(mmvp)
evaluate.command()(blink)
evaluate.command("llava-bench")(llava_bench)
