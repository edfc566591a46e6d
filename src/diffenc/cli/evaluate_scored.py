"""The commands of `diffenc evaluate` that score pictures and captions, and two studies of them."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffenc.cli.fields import summary_of, with_fields
from diffenc.cli.files import check_output, write_whole
from diffenc.cli.noted import NotedCommand, command_line
from diffenc.cli.options import (
    MINIATURE_NOTE,
    AsJson,
    Debug,
    begin_anew,
    kept_output,
    quiet_libraries,
)
from diffenc.cli.parsing import parse_timesteps
from diffenc.cli.progress import progress_bar
from diffenc.cli.tables import print_tables
from diffenc.config import check_choice
from diffenc.errors import ConfigError
from diffenc.evals.matching.options import MatchOptions
from diffenc.evals.tasks import MATCH_TASKS
from diffenc.evals.tasks.matching import MatchTask
from diffenc.storage.names import exists
from diffenc.storage.writing import locked, make_folder, remove_file, write_text

if TYPE_CHECKING:
    from diffenc.evals import Evaluation, Table

_SCORES = "scores.jsonl"
_BY_NAME: dict[str, type[MatchTask]] = {kind.name: kind for kind in MATCH_TASKS}

Output = Annotated[
    Path | None,
    kept_output(
        "FOLDER", "Folder that gets the scores of every item and the report", "-results", "scores"
    ),
]
Anew = Annotated[bool, begin_anew("scores in the folder")]
Paper = Annotated[
    bool | None,
    typer.Option("--paper/--no-paper", help="Show the paper's rows; default with real data alone."),
]
Benchmark = Annotated[str, typer.Argument(metavar="BENCHMARK", help=f"{' or '.join(_BY_NAME)}.")]
OnePreset = Annotated[
    str, typer.Option("--preset", metavar="NAME", help="Kind of score, see evaluate winoground.")
]


def add_scoring(app: typer.Typer) -> None:
    """Add a command for each benchmark, and the two studies."""
    for kind in MATCH_TASKS:
        command = with_fields(_benchmark, {"task": kind, "options": MatchOptions})
        app.command(kind.name, cls=NotedCommand, help=summary_of(kind))(command)
    kinds = {"task": MatchTask, "options": MatchOptions}
    for name, study, without in (
        ("timesteps", timesteps_study, {"presets", "clip", "timesteps"}),
        ("draws", draws_study, {"presets", "clip", "trials"}),
    ):
        app.command(name, cls=NotedCommand)(with_fields(study, kinds, without=without))


def _benchmark(
    task: MatchTask,
    options: MatchOptions,
    output: Output = None,
    paper: Paper = None,
    as_json: AsJson = False,
    force: Anew = False,
    _debug: Debug = False,
) -> None:
    folder = output or Path(f"{task.name}-results")
    evaluation = _score(task, options, folder, ("report.md", "report.json"), force=force)
    from diffenc.evals.matching.report import remarks, tables, to_dict, to_markdown

    content = to_dict(evaluation)
    page = to_markdown(evaluation, command=command_line(), paper=paper)
    written = _write_report(folder, "report", page, content)
    if as_json:
        typer.echo(json.dumps(content, indent=1, ensure_ascii=False))
        return
    print_tables(tables(evaluation, paper=paper), remarks(evaluation))
    _say_where(evaluation, [folder / _SCORES, *written])


def timesteps_study(
    benchmark: Benchmark,
    task: MatchTask,
    options: MatchOptions,
    preset: OnePreset = "calibrated",
    timesteps: Annotated[
        str | None,
        typer.Option(metavar="T,T", help="Noise levels with commas; default 89,189,...,989."),
    ] = None,
    ensemble: Annotated[
        str | None,
        typer.Option(
            metavar="T,T", help="Noise levels that are averaged; default 189,389,589,789,989."
        ),
    ] = None,
    output: Output = None,
    force: Anew = False,
    _debug: Debug = False,
) -> None:
    """Score single noise levels beside their mean.

    As in the paper's table 2, by kind or pattern, in all three ways, and with a picture.
    """
    from diffenc.evals.matching.plots import need_plots, plot_timesteps
    from diffenc.evals.matching.timesteps import ENSEMBLE, GRID, timestep_study, timestep_tables

    need_plots()
    grid = GRID if timesteps is None else parse_timesteps(timesteps)
    averaged = tuple(t for t in ENSEMBLE if t in grid) or grid
    if ensemble is not None:
        averaged = parse_timesteps(ensemble, option="ensemble")
    if set(averaged) - set(grid) or len(set(averaged)) < len(averaged):
        raise ConfigError(
            f"the ensemble must be some of the timesteps {grid}, each once, not {averaged}"
        )
    options = replace(options, presets=(preset,), timesteps=grid)
    folder = output or Path(f"{benchmark}-timesteps-results")
    names = tuple(f"timesteps{suffix}" for suffix in (".md", ".json", ".png"))
    evaluation = _score(
        _named(benchmark, task), options, folder, names, force=force, by_timestep=True
    )
    study = timestep_study(evaluation, next(iter(evaluation.scores)), grid, averaged)
    _report_study(
        evaluation,
        folder,
        "timesteps",
        timestep_tables(study),
        study.to_dict(),
        draw=lambda path: plot_timesteps(study, path),
    )


def draws_study(
    benchmark: Benchmark,
    task: MatchTask,
    options: MatchOptions,
    preset: OnePreset = "calibrated",
    noises: Annotated[int, typer.Option(min=6, help="Number of noises; all cost the same.")] = 24,
    output: Output = None,
    force: Anew = False,
    _debug: Debug = False,
) -> None:
    """See deviations fall with noise draws and trials.

    Every noise is one trial; they are regrouped into scores over several draws and into results
    over several trials, as a table and a picture.
    """
    from diffenc.evals.matching.draws import draw_study, draw_table
    from diffenc.evals.matching.plots import need_plots, plot_draws

    need_plots()
    options = replace(options, presets=(preset,), trials=noises)
    folder = output or Path(f"{benchmark}-draws-results")
    names = tuple(f"draws{suffix}" for suffix in (".md", ".json", ".png"))
    evaluation = _score(_named(benchmark, task), options, folder, names, force=force)
    study = draw_study(evaluation, next(iter(evaluation.scores)))
    _report_study(
        evaluation,
        folder,
        "draws",
        [draw_table(study)],
        study.to_dict(),
        draw=lambda path: plot_draws(study, path),
    )


def _named(benchmark: str, task: MatchTask) -> MatchTask:
    """The benchmark of a name, with the options of a task."""
    check_choice("benchmark", benchmark, tuple(_BY_NAME))
    return _BY_NAME[benchmark](**vars(task))


def _score(
    task: MatchTask,
    options: MatchOptions,
    folder: Path,
    names: Sequence[str],
    *,
    force: bool,
    by_timestep: bool = False,
) -> "Evaluation":
    """Read the data, load the models, look at all pictures, and score what is not in the file yet.

    Args:
        task: Benchmark and its data.
        options: What is compared, and how scores are made.
        folder: Folder of the results; it is made.
        names: Names of the files that will be written into it beside the scores.
        force: Whether scores that the folder holds are removed first.
        by_timestep: Whether scores are given for each timestep.

    Raises:
        DiffencError: Something of that cannot be read, loaded or written.
    """
    benchmark = task.load()
    is_new = not exists(folder)
    scores = _prepare_folder(folder, names, anew=force)
    quiet_libraries()
    from diffenc.evals.matching.contenders import load_matchers
    from diffenc.evals.matching.evaluate import evaluate
    from diffenc.evals.matching.inspection import inspect

    try:
        matchers = load_matchers(benchmark, options, by_timestep=by_timestep)
        with progress_bar("looking at pictures", unit="items") as progress:
            inspection = inspect(benchmark, matchers, progress=progress)
        inspection.check(benchmark.source, skip_broken=options.skip_broken)
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # nothing was written into it yet
        raise
    try:
        with progress_bar("scoring", unit="items x trials") as progress:
            return evaluate(
                benchmark,
                matchers,
                trials=options.trials,
                seed=options.seed,
                results=scores,
                skip_broken=options.skip_broken,
                inspection=inspection,
                progress=progress,
            )
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted; what was scored is in {scores}, and the same command goes on", err=True
        )
        raise typer.Abort from None


def _prepare_folder(folder: Path, names: Sequence[str], *, anew: bool) -> Path:
    """Make the output folder and find out whether its files can be written; the scores' path.

    Raises:
        OutputError: They cannot, or another program writes scores there.
    """
    make_folder(folder)
    for name in (_SCORES, *names):
        check_output(folder / name, suffixes=(Path(name).suffix,), force=True)
    with locked(folder, name=_SCORES, purpose="writing to it"):
        if anew:
            remove_file(folder / _SCORES)
    return folder / _SCORES


def _report_study(
    evaluation: "Evaluation",
    folder: Path,
    stem: str,
    tables: "list[Table]",
    content: object,
    *,
    draw: Callable[[Path], object],
) -> None:
    """Write picture, page and numbers of a study, print its tables, and say where they are."""
    from diffenc.evals.matching.report import remarks

    picture = folder / f"{stem}.png"
    write_whole(picture, draw)
    benchmark, notes = evaluation.benchmark, remarks(evaluation)
    page = "\n".join(
        [
            f"# {benchmark.name} on {benchmark.source}: {stem}\n",
            f"```console\n{command_line()}\n```\n",
            f"{next(iter(evaluation.scores))}, {len(evaluation.items)} items; ± is the sample "
            "standard deviation over trials with other noise.\n",
            f"![{stem}]({picture.name})\n",
            *(table.to_markdown() for table in tables),
            *(f"- {note}" for note in notes),
            "",
        ]
    )
    written = _write_report(folder, stem, page, content)
    print_tables(tables, notes)
    _say_where(evaluation, [folder / _SCORES, *written, picture])


def _write_report(folder: Path, name: str, page: str, content: object) -> list[Path]:
    """Write the Markdown and the JSON of a report; their paths."""
    paths = [folder / f"{name}.md", folder / f"{name}.json"]
    write_text(paths[0], page)
    write_text(paths[1], json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return paths


def _say_where(evaluation: "Evaluation", paths: list[Path]) -> None:
    """Say how much was there already, what the items are, and what was written."""
    trials = sum(map(len, evaluation.seeds.values())) * len(evaluation.items)
    if evaluation.fresh < trials:
        typer.echo(f"{trials - evaluation.fresh} of {trials} scores were there already")
    if not evaluation.benchmark.published:
        typer.echo(MINIATURE_NOTE)
    typer.echo(f"wrote {', '.join(map(str, paths))}")
