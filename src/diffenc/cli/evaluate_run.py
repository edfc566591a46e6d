"""Common parts of the commands of `diffenc evaluate`: data, models, progress, files."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffenc.cli.evaluate_models import load_matchers
from diffenc.cli.files import check_output
from diffenc.cli.progress import progress_bar
from diffenc.cli.tables import print_table
from diffenc.config import check_choice
from diffenc.errors import ConfigError
from diffenc.storage.writing import locked, make_folder, remove_file, write_text

if TYPE_CHECKING:
    from diffenc.evals.matching.base import Matcher, MatchingBenchmark
    from diffenc.evals.matching.evaluate import Evaluation
    from diffenc.evals.tables import Table

SCORES = "scores.jsonl"


def run_command(
    name: str,
    specs: list[str],
    clip: list[str],
    files: tuple[str, ...],
    *,
    by_timestep: bool,
    data: str,
    template: str | None,
    limit: int | None,
    per_label: int | None,
    data_seed: int | None,
    output: Path | None,
    force: bool,
    trials: int,
    seed: int,
    skip_broken: bool,
    **options: Any,
) -> "tuple[Evaluation, Path]":
    """Read the data, load the models, score; the result and its folder.

    Args:
        name: Name of the benchmark: "winoground" or "mmvp-vlm".
        specs: Names of presets of the scorer.
        clip: Names or folders of CLIP models that serve as baselines.
        files: Names of the files that will be written into the folder beside the scores.
        by_timestep: Whether scores are given for each timestep.
        data: Path or Hub id of the dataset, or "shapes" for the miniature.
        template: Text that is scored for a caption, see `Benchmark`; None keeps the benchmark's
            own.
        limit: Largest number of items; None takes all.
        per_label: Number of items per label of the miniature; None is its default.
        data_seed: Seed of the miniature; None is its default.
        output: Folder of the results; None is named after the benchmark.
        force: Whether scores that the folder holds are removed first.
        trials: Number of trials, 1 or more.
        seed: Seed of the first trial.
        skip_broken: Whether items that cannot be read are left out, instead of raising an error.
        options: Options of the models, see `load_matchers`.

    Raises:
        DiffencError: Something of that cannot be read, loaded or written.
    """
    benchmark = read_benchmark(
        name,
        data,
        per_label=per_label,
        data_seed=data_seed,
        template=template,
        limit=limit,
    )
    folder = output or Path(f"{name}-results")
    scores = prepare_folder(folder, files, anew=force)
    matchers = load_matchers(benchmark, specs, clip, by_timestep=by_timestep, **options)
    found = _score(
        *(benchmark, matchers),
        trials=trials,
        seed=seed,
        scores=scores,
        skip_broken=skip_broken,
    )
    return found, folder


def read_benchmark(
    name: str,
    data: str,
    *,
    per_label: int | None,
    data_seed: int | None,
    template: str | None,
    limit: int | None,
) -> "MatchingBenchmark":
    """The items that the command line asks for.

    Raises:
        ConfigError: There is no such data, or an option does not go with it.
    """
    check_choice("benchmark", name, ("winoground", "mmvp-vlm"))
    if template is not None and "{}" not in template:
        raise ConfigError(f"the template must hold {{}}, where the caption goes; got {template!r}")
    if data != "shapes" and (per_label is not None or data_seed is not None):
        raise ConfigError("--per-label and --data-seed belong to --data shapes")
    from diffenc.evals.matching.miniature import SHAPES_SEED, shapes_benchmark
    from diffenc.evals.matching.mmvp_vlm import load_mmvp_vlm
    from diffenc.evals.matching.winoground import load_winoground

    if data == "shapes":
        seed = SHAPES_SEED if data_seed is None else data_seed
        benchmark = shapes_benchmark(name, per_label=per_label, seed=seed)  # type: ignore[arg-type]
    else:
        benchmark = (load_winoground if name == "winoground" else load_mmvp_vlm)(data)
    if template is not None:
        benchmark = replace(benchmark, template=template)
    return benchmark if limit is None else replace(benchmark, items=benchmark.items[:limit])


def prepare_folder(folder: Path, names: Sequence[str], *, anew: bool) -> Path:
    """Make the output folder and find out whether its files can be written; the scores' path.

    Raises:
        OutputError: They cannot, or another program writes scores there.
    """
    make_folder(folder)
    for name in (SCORES, *names):
        check_output(folder / name, suffixes=(Path(name).suffix,), force=True)
    with locked(folder, name=SCORES, purpose="writing to it"):
        if anew:
            remove_file(folder / SCORES)
    return folder / SCORES


def write_report(folder: Path, name: str, page: str, content: object) -> list[Path]:
    """Write the Markdown and the JSON of a report; their paths."""
    paths = [folder / f"{name}.md", folder / f"{name}.json"]
    write_text(paths[0], page)
    write_text(paths[1], json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return paths


def print_tables(tables: "Sequence[Table]", notes: Sequence[str]) -> None:
    """Print tables, then notes on standard error."""
    for table in tables:
        print_table(table.title, table.columns, table.rows, right=table.columns[1:])
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def given_options(values: dict[str, Any]) -> dict[str, Any]:
    """The options among the local names of a command."""
    return {name: value for name, value in values.items() if name != "_debug"}


def _score(
    benchmark: "MatchingBenchmark",
    matchers: "Sequence[Matcher]",
    *,
    trials: int,
    seed: int,
    scores: Path,
    skip_broken: bool,
) -> "Evaluation":
    """Check all pictures, then score what is not in the file yet, with progress bars.

    Raises:
        ConfigError: Broken data, or a file of another run.
    """
    from diffenc.evals.matching.evaluate import evaluate
    from diffenc.evals.matching.inspection import inspect

    with progress_bar("looking at pictures", unit="items") as progress:
        inspection = inspect(benchmark, matchers, progress=progress)
    inspection.check(benchmark.source, skip_broken=skip_broken)
    try:
        with progress_bar("scoring", unit="items x trials") as progress:
            return evaluate(
                benchmark,
                matchers,
                trials=trials,
                seed=seed,
                results=scores,
                skip_broken=skip_broken,
                inspection=inspection,
                progress=progress,
            )
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted; what was scored is in {scores}, and the same command goes on", err=True
        )
        raise typer.Abort from None


def say_where(found: "Evaluation", paths: list[Path]) -> None:
    """Say how much was there already, what the items are, and what was written."""
    trials = sum(map(len, found.seeds.values())) * len(found.items)
    if found.fresh < trials:
        typer.echo(f"{trials - found.fresh} of {trials} scores were there already")
    if found.benchmark.expected is None:
        typer.echo("The items are coloured shapes of 64 pixels; they say nothing of photographs.")
    typer.echo(f"wrote {', '.join(map(str, paths))}")
