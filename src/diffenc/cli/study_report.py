"""What the commands of `diffenc study` share: options, and the way from a run to its report."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffenc._version import __version__
from diffenc.cli.files import check_output, write_whole
from diffenc.cli.noted import command_line
from diffenc.cli.options import quiet_libraries, to_device
from diffenc.cli.progress import Progress, progress_bar
from diffenc.cli.tables import print_tables
from diffenc.storage.writing import make_folder, write_json, write_text

if TYPE_CHECKING:
    from diffenc.evals.tables import Table

Output = Annotated[
    Path,
    typer.Option(
        *("--output", "-o"),
        metavar="FOLDER",
        help="Folder of the .md, .json and picture; created if missing.",
    ),
]
Backbone = Annotated[
    str,
    typer.Option(
        *("--backbone", "--model", "-b", "-m"),
        metavar="NAME",
        help="Alias, Hub id or diffusers folder; see diffenc info.",
    ),
]
Clip = Annotated[
    str,
    typer.Option(metavar="NAME", help="CLIP beside: a folder, a Hub id, shapes-clip, or none."),
]
Seeds = Annotated[int, typer.Option(help="Number of repetitions with other scenes and noise.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny run, which shows that all works.")]


def run_and_report(
    output: Path,
    name: str,
    run: Callable[[Progress | None], Any],
    *,
    page: Callable[..., str],
    tables: "Callable[[Any], Sequence[Table]]",
    remarks: Callable[[Any], Sequence[str]],
    draw: Callable[[Any, Path], None] | None = None,
    unit: str = "",
    device: str,
    force: bool,
) -> None:
    """Run a study; write its page, numbers and picture; print its tables.

    Args:
        output: Folder of the files.
        name: Name of the files, without suffix.
        run: Function that runs the study and reports its progress.
        page: Function that makes the page of the results, with `command`, `made_with` and, if there
            is one, `picture`.
        tables: Function that makes the tables for the terminal.
        remarks: Function that makes the lines under them.
        draw: Function that draws the results into a file; None if there is no picture.
        unit: Name of the things that the progress counts; "" counts shares.
        device: Device as it was named on the command line.
        force: Whether files may be replaced.

    Raises:
        OutputError: The files cannot be written, or exist.
        MissingExtraError: matplotlib is not installed, and there is a picture to draw.
    """
    suffixes = (".md", ".json") if draw is None else (".md", ".json", ".png")
    make_folder(output)
    paths = {suffix: output / f"{name}{suffix}" for suffix in suffixes}
    for suffix, path in paths.items():
        check_output(path, suffixes=(suffix,), force=force)
    if draw is not None:
        from diffenc.studies.charts import need_charts

        need_charts()
    quiet_libraries()
    start = time.perf_counter()
    with progress_bar(name, unit=unit) as progress:
        results = run(progress)
    made = _made_with(time.perf_counter() - start, device)
    picture = {} if draw is None else {"picture": paths[".png"].name}
    text = page(results, command=command_line(), made_with=made, **picture)
    write_json(paths[".json"], {"made_with": made, **results.to_dict()}, indent=1)
    if draw is not None:
        write_whole(paths[".png"], lambda path: draw(results, path))
    write_text(paths[".md"], text)
    print_tables(tables(results))
    for remark in remarks(results):
        typer.echo(remark)
    typer.echo(f"wrote {', '.join(map(str, paths.values()))}")


def _made_with(seconds: float, device: str) -> str:
    """Versions, kind of hardware and time."""
    import diffusers
    import torch

    return (
        f"diffenc {__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}; "
        f"{hardware(device)}; {seconds / 60:.1f} minutes."
    )


def hardware(device: str) -> str:
    """Name of the GPU, or kind of processor and number of its cores."""
    import torch

    where = to_device(device)
    if where.type == "cuda":
        return str(torch.cuda.get_device_name(where))
    threads = torch.get_num_threads()
    return f"{where.type} ({platform.machine()}, {threads} of {os.cpu_count()} cores)"
