"""`diffenc study guidance` and its like: train multimodal models, measure and compare them."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffenc.cli.files import check_output
from diffenc.cli.noted import NotedCommand
from diffenc.cli.options import Debug, Device, Force, quiet_libraries, to_device
from diffenc.cli.study_report import Output, Quick, run_and_report
from diffenc.cli.tables import print_tables
from diffenc.errors import ConfigError
from diffenc.storage.names import is_folder
from diffenc.storage.writing import write_text

if TYPE_CHECKING:
    from diffenc.evals.tables import Table
    from diffenc.studies.vlm import StudyPlan, VlmStudy
    from diffenc.studies.vlm.estimate import Work

_HELP = {
    "guidance": "Captions by guidance scale, under oracle and honest prompts.",
    "leakage": "How much of a foreign prompt is said, by guidance; prompt dropout as the cure.",
    "prompts": "What the encoder is told in both stages: nothing, captions, questions, both.",
    "conditioning": "No text, text, guidance, and both side by side (concat).",
    "fusion": "CLIP, the diffusion model, and both as one encoder.",
    "lora": "LoRA on the U-Net's cross-attention in the second stage.",
    "captioner": "The implicit captioner, against no text and against questions.",
    "refinement": "Captions fed back as prompts, pass after pass.",
    "tokens": "Few tokens of the question's words against a grid of 64, in crowded scenes.",
}
_MORE = """

Trains and measures what its TOML file says, and tells which findings of the paper hold here. What
is done is kept in --work: an interrupted study goes on where it was, within a training too, and
studies share trainings."""

Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE.toml", help="File of a study of your own; see --write-config."),
]
WriteConfig = Annotated[
    Path | None,
    typer.Option(metavar="FILE.toml", help="Copy of the study's file to be edited; no run."),
]
WorkFolder = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER", help="Folder of trainings and figures, which studies share and go on in."
    ),
]
SeedCount = Annotated[
    int | None, typer.Option(min=1, help="Number of repetitions; default the plan's, three.")
]
LanguageModel = Annotated[
    str | None, typer.Option(metavar="NAME", help="Folder or Hub id in place of the plan's.")
]
Clip = Annotated[
    str | None, typer.Option(metavar="NAME", help="Folder or Hub id in place of the bundled CLIP.")
]
PlanOnly = Annotated[
    bool,
    typer.Option(
        "--plan", help="List of trainings and measurements with times; no run, and no file."
    ),
]


def add_studies(group: typer.Typer) -> None:
    """Make each bundled study a command."""
    for name, about in _HELP.items():
        group.command(name, cls=NotedCommand, help=about + _MORE)(_command(name))


def _command(name: str) -> Callable[..., None]:
    def run(
        output: Output = Path(f"{name}-study"),
        config: Config = None,
        write_config: WriteConfig = None,
        work: WorkFolder = Path("study-work"),
        seeds: SeedCount = None,
        language_model: LanguageModel = None,
        clip: Clip = None,
        plan: PlanOnly = False,
        quick: Quick = False,
        device: Device = "auto",
        force: Force = False,
        _debug: Debug = False,
    ) -> None:
        if write_config is not None:
            _write_config(name, write_config, force=force)
            return
        from diffenc.studies.vlm import bundled_plan, read_plan

        study = bundled_plan(name) if config is None else read_plan(name, config)
        study = study.with_options(seeds=seeds, language_model=language_model, clip=clip)
        if quick:
            study = study.quick()
        if plan:
            _print_plan(study, work, device)
        else:
            _run(study, output, work, device, force=force)

    return run


def _run(plan: "StudyPlan", output: Path, work: Path, device: str, *, force: bool) -> None:
    from diffenc.studies.vlm import study_vlm
    from diffenc.studies.vlm.page import draw_study, to_markdown

    run_and_report(
        output,
        plan.name,
        lambda progress: study_vlm(plan, work=work, device=to_device(device), progress=progress),
        page=to_markdown,
        tables=_tables,
        remarks=_remarks,
        draw=draw_study if plan.plots else None,
        device=device,
        force=force,
    )


def _tables(study: "VlmStudy") -> "list[Table]":
    from diffenc.studies.vlm.tables import figure_tables, finding_table

    return [*figure_tables(study).values(), finding_table(study)]


def _remarks(study: "VlmStudy") -> list[str]:
    there = study.trained - study.fresh
    counts = f"{study.trained} trainings, {there} of them done before"
    return [*_not_run(study.missing), counts]


def _print_plan(plan: "StudyPlan", work: Path, device: str) -> None:
    from diffenc.studies.vlm.estimate import measure_costs, work_of
    from diffenc.studies.vlm.tables import measurement_table, training_table
    from diffenc.studies.vlm.workshop import Workshop

    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:  # for the pictures that are timed
        workshop = Workshop(plan, scratch, device=to_device(device))
        missing = workshop.missing()
        if len(missing) == len(plan.trainings):
            raise ConfigError(f"no training can be done: {next(iter(missing.values()))}")
        all_work = work_of(plan, missing, measure_costs(workshop))
    done = Workshop(plan, work).count_trained() if is_folder(work) else 0
    print_tables([training_table(plan), measurement_table(plan), _work_table(all_work)])
    typer.echo(
        f"{done} trainings are there already. Times are told from a few "
        "pictures and a batch on this machine, as if nothing were there; tokens of pictures that "
        "studies share are read once."
    )
    for line in _not_run(missing):
        typer.echo(line)


def _work_table(work: "Work") -> "Table":
    from diffenc.evals.tables import Table

    rows = []
    for what, title, unit in (
        ("train", "trainings", "steps"),
        ("measure", "measurements", "answers"),
    ):
        pieces = [piece for piece in work.pieces if piece.what == what]
        count = sum(piece.count for piece in pieces) * work.seeds
        seconds = sum(piece.seconds for piece in pieces) * work.seeds
        many = str(len(pieces) * work.seeds)
        rows.append((title, many, f"{count:,} {unit}", _minutes(seconds)))
    rows.append(("in all", "", "", _minutes(work.total)))
    return Table(f"{work.seeds} seeds", ("what", "how many", "of", "time"), tuple(rows))


def _not_run(missing: Mapping[str, str]) -> list[str]:
    from diffenc.studies.pages import by_reason

    reasons = by_reason(missing).items()
    return [f"not run: {', '.join(names)} ({reason})" for reason, names in reasons]


def _write_config(name: str, path: Path, *, force: bool) -> None:
    from diffenc.studies.vlm.plan_file import bundled_text

    check_output(path, suffixes=(".toml",), force=force)
    write_text(path, bundled_text(name))
    typer.echo(f"wrote {path}")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"
