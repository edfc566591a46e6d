"""`diffenc study guidance` and its like: train multimodal models, measure and compare them."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffenc.cli.noted import NotedCommand, command_line
from diffenc.cli.options import Debug, Device, Force, quiet_libraries, to_device
from diffenc.cli.study_options import Output, Quick
from diffenc.cli.study_run import made_with, output_paths, say_written, work_bar, write_study
from diffenc.cli.tables import print_table
from diffenc.errors import ConfigError
from diffenc.storage.writing import write_text

if TYPE_CHECKING:
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
}
_MORE = """

Trains and measures what its TOML file says, and tells which findings of the paper hold here. What
is done is kept in --work: an interrupted study goes on where it was, within a training too, and
studies share trainings."""

Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE.toml", help="A study of your own: see --write-config."),
]
WriteConfig = Annotated[
    Path | None,
    typer.Option(metavar="FILE.toml", help="Write the study's file, to be edited; stop."),
]
WorkFolder = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER", help="Keeps trainings and figures; studies share it, runs go on in it."
    ),
]
SeedCount = Annotated[
    int | None, typer.Option(min=1, help="Repetitions; default the plan's, three.")
]
LanguageModel = Annotated[
    str | None, typer.Option(metavar="NAME", help="A folder or Hub id, instead of the plan's.")
]
Clip = Annotated[
    str | None, typer.Option(metavar="NAME", help="A folder or Hub id, instead of shapes-clip.")
]
PlanOnly = Annotated[
    bool, typer.Option("--plan", help="Tell what is trained and measured, and how long; stop.")
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

        told = bundled_plan(name) if config is None else read_plan(name, config)
        told = told.with_options(seeds=seeds, language_model=language_model, clip=clip)
        if quick:
            told = told.quick()
        quiet_libraries()
        if plan:
            _plan(told, work, device)
        else:
            _run(told, output, work, device, force=force)

    return run


def _run(plan: "StudyPlan", output: Path, work: Path, device: str, *, force: bool) -> None:
    from diffenc.studies.vlm import study_vlm
    from diffenc.studies.vlm.plots import need_plots, plot_study
    from diffenc.studies.vlm.report import to_markdown

    suffixes = (".md", ".json", ".png") if plan.plots else (".md", ".json")
    paths = output_paths(output, plan.name, suffixes, force=force)
    if plan.plots:
        need_plots()
    start = time.perf_counter()
    with work_bar() as progress:
        found = study_vlm(plan, work=work, device=to_device(device), progress=progress)
    made = made_with(time.perf_counter() - start, device)
    page = to_markdown(
        found,
        command=command_line(),
        made_with=made,
        picture=paths[".png"].name if plan.plots else None,
    )
    write_study(
        paths,
        page=page,
        content={"made_with": made, **found.to_dict()},
        draw=(lambda path: plot_study(found, path)) if plan.plots else None,
    )
    _print_study(found)
    say_written(paths)


def _plan(plan: "StudyPlan", work: Path, device: str) -> None:
    from diffenc.studies.vlm.estimate import measure_costs, work_of
    from diffenc.studies.vlm.tables import measurement_table, training_table
    from diffenc.studies.vlm.workshop import Workshop

    workshop = Workshop(plan, work, device=to_device(device))
    missing = workshop.missing()
    if len(missing) == len(plan.trainings):
        raise ConfigError(f"no training can be done: {next(iter(missing.values()))}")
    told = work_of(plan, missing, measure_costs(workshop))
    for table in (training_table(plan), measurement_table(plan)):
        print_table(table.title, list(table.columns), [list(row) for row in table.rows])
    _print_work(plan, told, workshop.count_trained())
    _print_missing(missing)


def _print_work(plan: "StudyPlan", work: "Work", done: int) -> None:
    rows = []
    for what, title in (("train", "trainings"), ("measure", "measurements")):
        pieces = [piece for piece in work.pieces if piece.what == what]
        unit = "steps" if what == "train" else "answers"
        count = sum(piece.count for piece in pieces) * plan.seeds
        seconds = sum(piece.seconds for piece in pieces) * plan.seeds
        row = [title, str(len(pieces) * plan.seeds), f"{count:,} {unit}", _minutes(seconds)]
        rows.append(row)
    rows.append(["in all", "", "", _minutes(work.total)])
    columns = ["what", "how many", "of", "time"]
    print_table(f"{plan.seeds} seeds", columns, rows, right=["how many", "of", "time"])
    typer.echo(
        f"{done} trainings are there already. Times are told from a few pictures and a batch on "
        "this machine, as if nothing were there; tokens of pictures that studies share are read "
        "once."
    )


def _print_study(found: "VlmStudy") -> None:
    from diffenc.studies.vlm.tables import figure_tables, finding_table

    for table in (*figure_tables(found), finding_table(found)):
        print_table(
            table.title,
            list(table.columns),
            [list(row) for row in table.rows],
            right=list(table.columns[2:]),
        )
    _print_missing(found.missing)
    there = found.trained - found.fresh
    typer.echo(f"{found.trained} trainings, {there} of them done before")


def _print_missing(missing: Mapping[str, str]) -> None:
    for reason in dict.fromkeys(missing.values()):
        names = [name for name, why in missing.items() if why == reason]
        typer.echo(f"not run: {', '.join(names)} ({reason})")


def _write_config(name: str, path: Path, *, force: bool) -> None:
    from diffenc.cli.files import check_output
    from diffenc.studies.vlm.reading import bundled_text

    check_output(path, suffixes=(".toml",), force=force)
    write_text(path, bundled_text(name))
    typer.echo(f"wrote {path}")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"
