"""`diffenc study table`: the table of models, taps, timesteps and texts, made or extended."""

from pathlib import Path
from typing import Annotated

import typer

from diffenc.cli.fields import split_names
from diffenc.cli.files import check_output
from diffenc.cli.options import Debug, Device, Dtype, quiet_libraries, to_device, to_dtype
from diffenc.cli.parsing import parse_timesteps
from diffenc.cli.progress import progress_bar
from diffenc.cli.study_report import Backbone, hardware
from diffenc.cli.tables import print_tables
from diffenc.storage.writing import make_folder, write_text


def table(
    output: Annotated[
        Path,
        typer.Option(
            *("--output", "-o"),
            metavar="FOLDER",
            help="Folder of the .csv files, one a model; rows that are there stay.",
        ),
    ] = Path("results"),
    backbone: Backbone = "shapes",
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What is measured, repeated: shapes (the default), spair=FOLDER, nyu=FOLDER, "
            "navi=FOLDER; none counts parameters and arithmetic without any weights.",
        ),
    ] = None,
    taps: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Places in the denoiser, with commas or repeated; default its blocks and its "
            "default taps.",
        ),
    ] = None,
    timesteps: Annotated[
        str, typer.Option(metavar="T,T", help="Noise levels, 0 to 999.")
    ] = "50,261",
    texts: Annotated[
        str, typer.Option(metavar="WORDS", help="none and text, with commas.")
    ] = "none,text",
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model in the table; default the alias or the folder's."),
    ] = None,
    scenes: Annotated[
        int, typer.Option(help="Number of miniature scenes that heads are fitted to, 30 or more.")
    ] = 120,
    pairs: Annotated[int, typer.Option(help="Number of miniature pairs of pictures.")] = 60,
    most: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most pairs or pictures of a dataset; default all."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Page (.md) of all tables of the folder, made anew."),
    ] = None,
    time: Annotated[
        bool | None,
        typer.Option("--time/--no-time", help="Time calls; default where anything is measured."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Side of the pictures; default the model's own."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Number of pictures x timesteps per pass, and of a timed batch.")
    ] = 16,
    device: Device = "auto",
    dtype: Dtype = "float32",
    _debug: Debug = False,
) -> None:
    """What each model, tap, timestep and text costs, and what can be read there.

    Parameters, arithmetic, time; a linear probe, correspondence, segmentation and depth order in
    the miniature world; correspondence on SPair-71k and NAVI, depth and normals on NYU and NAVI.
    Rows go to <folder>/<model>.csv, after each dataset. Takes some minutes with the bundled model.
    """
    entries = data or ["shapes"]
    entries = [] if entries == ["none"] else entries
    steps = parse_timesteps(timesteps)
    words = [word.strip() for word in texts.split(",") if word.strip()]
    make_folder(output)
    if page is not None:
        check_output(page, suffixes=(".md",), force=True)
    quiet_libraries()

    from diffenc.models import describe
    from diffenc.studies.place_data import Extent, measures_of
    from diffenc.studies.place_page import model_table, to_markdown
    from diffenc.studies.place_table import joined, model_label, place_table, read_rows, write_rows

    label = name or model_label(backbone)
    path = output / f"{label}.csv"
    check_output(path, suffixes=(".csv",), force=True)
    before = read_rows(path)
    side = size or describe(backbone).default_size
    extent = Extent(scenes, pairs, most)
    measures = [measure for entry in entries for measure in measures_of(entry, side, extent)]
    with progress_bar("table", unit="scenes, pairs and pictures") as progress:
        rows = place_table(
            backbone,
            measures,
            name=label,
            taps=split_names(taps),
            timesteps=steps,
            texts=words,  # type: ignore[arg-type]  # checked there
            size=size,
            batch_size=batch_size,
            timed=bool(measures) if time is None else time,
            device=to_device(device),
            dtype=to_dtype(dtype),
            hardware=hardware(device),
            progress=progress,
            keep=lambda rows: write_rows(path, joined(before, rows)),
        )
    write_rows(path, joined(before, rows))
    print_tables([model_table(rows)])
    typer.echo(f"wrote {path}")
    if page is not None:
        every = [row for file in sorted(output.glob("*.csv")) for row in read_rows(file)]
        write_text(page, to_markdown(every))
        typer.echo(f"wrote {page}")
