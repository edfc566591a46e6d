"""`diffenc evaluate timesteps` and `draws`: two studies on the benchmarks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffenc.cli.encode import parse_timestep
from diffenc.cli.evaluate_options import (
    Anew,
    BenchmarkArgument,
    Data,
    DataReferences,
    DataSeed,
    FirstSeed,
    Limit,
    OnePreset,
    Output,
    PerLabel,
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
from diffenc.cli.files import write_whole
from diffenc.cli.noted import command_line
from diffenc.cli.options import Debug, Device, Dtype, Model, SkipBroken
from diffenc.cli.score_options import BatchSize, Layers, References, ResizeOption, Size
from diffenc.errors import ConfigError

if TYPE_CHECKING:
    from diffenc.evals.matching.evaluate import Evaluation
    from diffenc.evals.tables import Table


def timesteps_study(
    benchmark: BenchmarkArgument,
    data: Data,
    model: Model = "shapes",
    preset: OnePreset = "calibrated",
    trials: Trials = 3,
    seed: FirstSeed = 0,
    timesteps: Annotated[
        str | None, typer.Option(metavar="T,T", help="Default 89,189,...,989.")
    ] = None,
    ensemble: Annotated[
        str | None,
        typer.Option(metavar="T,T", help="Those averaged; default 189,389,589,789,989."),
    ] = None,
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
    batch_size: BatchSize = 16,
    force: Anew = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    _debug: Debug = False,
) -> None:
    """Score single noise levels beside their mean.

    As in the paper's table 2, by kind or pattern, in all three ways, and with a picture.
    """
    given = given_options(locals())
    from diffenc.evals.matching.plots import need_plots, plot_timesteps
    from diffenc.evals.matching.timesteps import ENSEMBLE, GRID, timestep_study, timestep_tables

    need_plots()
    grid = GRID if timesteps is None else _steps(timesteps)
    picked = _steps(ensemble) if ensemble else tuple(t for t in ENSEMBLE if t in grid) or grid
    if outside := sorted(set(picked) - set(grid)):
        raise ConfigError(f"the ensemble must be some of the timesteps {grid}, not {outside}")
    given["timesteps"] = ",".join(map(str, grid))
    names = ("timesteps.md", "timesteps.json", "timesteps.png")
    found, folder = _study(names, by_timestep=True, **given)
    study = timestep_study(found, next(iter(found.scores)), grid, picked)
    tables = timestep_tables(study)
    write_whole(folder / names[2], lambda path: plot_timesteps(study, path))
    _finish(found, folder, names, tables, study.to_dict())


def draws_study(
    benchmark: BenchmarkArgument,
    data: Data,
    model: Model = "shapes",
    preset: OnePreset = "calibrated",
    noises: Annotated[int, typer.Option(min=6, help="How many; all cost the same.")] = 24,
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
    batch_size: BatchSize = 16,
    force: Anew = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    _debug: Debug = False,
) -> None:
    """See deviations fall with noise draws and trials.

    Every noise is one trial; they are regrouped into scores over several draws and into results
    over several trials, as a table and a picture.
    """
    given = {**given_options(locals()), "trials": noises}
    del given["noises"]
    from diffenc.evals.matching.draws import draw_study, draw_table
    from diffenc.evals.matching.plots import need_plots, plot_draws

    need_plots()
    names = ("draws.md", "draws.json", "draws.png")
    found, folder = _study(names, by_timestep=False, **given)
    study = draw_study(found, next(iter(found.scores)))
    write_whole(folder / names[2], lambda path: plot_draws(study, path))
    _finish(found, folder, names, [draw_table(study)], study.to_dict())


def _study(
    files: tuple[str, ...], *, benchmark: str, preset: str, **given: Any
) -> "tuple[Evaluation, Path]":
    given.pop("ensemble", None)
    given["output"] = given["output"] or Path(f"{benchmark}-{Path(files[0]).stem}-results")
    return run_command(benchmark, [preset], [], files, **given)


def _steps(text: str) -> tuple[int, ...]:
    found = parse_timestep(text)
    return (found,) if isinstance(found, int) else found


def _finish(
    found: "Evaluation",
    folder: Path,
    files: tuple[str, ...],
    tables: "list[Table]",
    content: object,
) -> None:
    from diffenc.evals.matching.report import remarks

    benchmark, notes = found.benchmark, remarks(found)
    stem = Path(files[0]).stem
    page = "\n".join(
        [
            f"# {benchmark.name} on {benchmark.source}: {stem}\n",
            f"```console\n{command_line()}\n```\n",
            f"{next(iter(found.scores))}, {len(found.items)} items; ± is the sample standard "
            "deviation over trials with other noise.\n",
            f"![{stem}]({files[2]})\n",
            *(table.to_markdown() for table in tables),
            *(f"- {note}" for note in notes),
            "",
        ]
    )
    written = write_report(folder, stem, page, content)
    print_tables(tables, notes)
    say_where(found, [folder / "scores.jsonl", *written, folder / files[2]])
