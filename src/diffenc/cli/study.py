"""`diffenc study`: experiments as one command each, written as tables and pictures."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffenc.cli.noted import NotedCommand, command_line
from diffenc.cli.options import (
    Debug,
    Device,
    Dtype,
    Force,
    quiet_libraries,
    to_device,
    to_dtype,
)
from diffenc.cli.parsing import parse_timestep
from diffenc.cli.study_options import Backbone, Output, Quick, Seeds
from diffenc.cli.study_run import (
    made_with,
    output_paths,
    progress_bar,
    say_written,
    write_study,
)
from diffenc.cli.study_vlm import add_studies
from diffenc.cli.tables import print_table

if TYPE_CHECKING:
    from diffenc.studies.parts_results import PartStudy
    from diffenc.studies.results import FeatureStudy

study = typer.Typer(help="Experiments with a model, written as tables and pictures.")

_QUICK = {"scenes": 30, "seeds": 1, "reader_epochs": 2, "rank": 2}


@study.callback()
def _several() -> None:
    """Experiments with a model, written as tables and pictures."""


@study.command(cls=NotedCommand)
def features(
    output: Output = Path("feature-study"),
    backbone: Backbone = "shapes",
    taps: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Places in the U-Net, with commas or repeated; default the blocks and the "
            "model's default taps.",
        ),
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(metavar="T,T", help="Noise levels, 0 to 999; default 10,50,261,500,800."),
    ] = None,
    texts: Annotated[
        str,
        typer.Option(metavar="WORDS", help="Some of uncond, question and caption, with commas."),
    ] = "uncond,question,caption",
    scenes: Annotated[int, typer.Option(help="Per seed, for the readouts; 30 or more.")] = 240,
    focus_scenes: Annotated[
        int, typer.Option(help="Per seed, for where a text acts; 0 leaves that out.")
    ] = 60,
    seeds: Seeds = 3,
    size: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Side; default the model's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Scenes x timesteps per pass.")] = 48,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """Which tap and timestep carries colour, shape, position and count.

    Linear readouts on frozen features of held-out scenes of coloured shapes, without a text, under
    a question and under a caption; then whether a text acts inside the object that it names. Takes
    some minutes with the bundled model on one core.
    """
    steps = None if timesteps is None else parse_timestep(timesteps)
    paths = output_paths(output, "features", (".md", ".json", ".png"), force=force)
    conditionings = tuple(name.strip() for name in texts.split(",") if name.strip())

    from diffenc.studies.features import TIMESTEPS, study_features
    from diffenc.studies.report import heat_map, to_markdown

    quiet_libraries()
    start = time.perf_counter()
    with progress_bar() as progress:
        found = study_features(
            backbone,
            taps=[name for entry in taps for name in entry.split(",") if name] if taps else None,
            timesteps=TIMESTEPS if steps is None else (steps,) if isinstance(steps, int) else steps,
            conditionings=conditionings,  # type: ignore[arg-type]  # checked there
            scenes=scenes,
            focus_scenes=focus_scenes,
            seeds=seeds,
            size=size,
            batch_size=batch_size,
            device=to_device(device),
            dtype=to_dtype(dtype),
            progress=progress,
        )
    made = made_with(time.perf_counter() - start, device)
    page = to_markdown(
        found,
        command=command_line(),
        made_with=made,
        picture=paths[".png"].name,
    )
    content = {"made_with": made, **found.to_dict()}
    write_study(paths, page=page, content=content, draw=heat_map(found).save)
    _print_study(found)
    if found.model == "shapes":
        typer.echo("The bundled model knows coloured shapes only; so do the scenes of this study.")
    say_written(paths)


@study.command(cls=NotedCommand)
def parts(
    output: Output = Path("part-study"),
    backbone: Backbone = "shapes",
    clip: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="CLIP to fuse with: a folder, a Hub id, shapes-clip, or none."
        ),
    ] = "shapes-clip",
    scenes: Annotated[int, typer.Option(help="Per seed; 30 or more.")] = 360,
    seeds: Seeds = 3,
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 8,
    epochs: Annotated[int, typer.Option(help="Of LoRA over the questions.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Rows per pass of the U-Net.")] = 16,
    quick: Quick = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """What question, concatenation, CLIP, LoRA and captioner add to answers.

    Small readers answer questions about held-out scenes of coloured shapes from the tokens of each
    part. Takes up to ten minutes with the bundled model on one core.
    """
    paths = output_paths(output, "parts", (".md", ".json"), force=force)

    from diffenc.studies.parts import study_parts
    from diffenc.studies.parts_report import to_markdown

    quiet_libraries()
    start = time.perf_counter()
    options = {"scenes": scenes, "seeds": seeds, "rank": rank, "epochs": epochs}
    with progress_bar("passes") as progress:
        found = study_parts(
            backbone,
            clip=None if clip == "none" else clip,
            batch_size=batch_size,
            device=to_device(device),
            dtype=to_dtype(dtype),
            progress=progress,
            **{**options, **(_QUICK if quick else {})},
        )
    made = made_with(time.perf_counter() - start, device)
    page = to_markdown(found, command=command_line(), made_with=made)
    write_study(paths, page=page, content={"made_with": made, **found.to_dict()})
    _print_parts(found)
    say_written(paths)


add_studies(study)


def _print_study(found: "FeatureStudy") -> None:
    from diffenc.studies.report import FOCUS_COLUMNS, best_columns, best_rows, focus_rows

    # One table per text: on one line they would not fit a terminal.
    columns, rows = best_columns(found), best_rows(found)
    print_table(
        "accuracy of linear readouts, what the U-Net starts from",
        columns[:4],
        [row[:4] for row in rows],
        right=columns[1:4],
    )
    for index, column in enumerate(columns[4:], start=4):
        if column.startswith("best"):
            shown = [0, index]
            if index + 1 < len(columns) and columns[index + 1].startswith("gain"):
                shown.append(index + 1)
            heads = [columns[k].split(" with ")[0].split(" of ")[0] for k in shown]
            print_table(
                f"accuracy, {column.removeprefix('best ')}",
                heads,
                [[row[k] for k in shown] for row in rows],
            )
    if found.focus:
        print_table("where a text acts", FOCUS_COLUMNS, focus_rows(found))


def _print_parts(found: "PartStudy") -> None:
    from diffenc.studies import parts_report as report

    for title, columns, rows in (
        ("accuracy of answers", report.part_columns(), report.part_rows(found)),
        ("gains in mean accuracy", report.gain_columns(), report.gain_rows(found)),
        ("a probe through the projector", report.norm_columns(), report.norm_rows(found)),
    ):
        print_table(title, columns, rows, right=columns[2:])
    for reason in dict.fromkeys(found.missing.values()):
        missing = [part for part in found.missing if found.missing[part] == reason]
        typer.echo(f"not studied: {', '.join(missing)} ({reason})")
