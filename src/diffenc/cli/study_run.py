"""Common parts of the commands of `diffenc study`: files, progress, versions and hardware."""

import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from diffenc._version import __version__
from diffenc.cli.files import check_output, write_whole
from diffenc.cli.options import to_device
from diffenc.storage.writing import make_folder, write_json, write_text

Progress = Callable[[int, int], None]
"""Function that is called with the amount of work done, and the amount of all work."""


def output_paths(
    folder: Path, name: str, suffixes: Sequence[str], *, force: bool
) -> dict[str, Path]:
    """The files of a study, by suffix, found out to be writable; the folder is made.

    Raises:
        OutputError: They cannot be written, or exist.
    """
    make_folder(folder)
    paths = {suffix: folder / f"{name}{suffix}" for suffix in suffixes}
    for suffix, path in paths.items():
        check_output(path, suffixes=(suffix,), force=force)
    return paths


def write_study(
    paths: Mapping[str, Path],
    *,
    page: str,
    content: Mapping[str, Any],
    draw: Callable[[Path], object] | None = None,
) -> None:
    """Write a study's page, its numbers and its picture, and say where.

    Raises:
        OutputError: They cannot be written.
    """
    write_json(paths[".json"], content, indent=1)
    if draw is not None:
        write_whole(paths[".png"], draw)
    write_text(paths[".md"], page)


def made_with(seconds: float, device: str) -> str:
    """Versions, kind of hardware and time."""
    import diffusers
    import torch

    where = to_device(device)
    hardware = (
        torch.cuda.get_device_name(where)
        if where.type == "cuda"
        else f"{where.type} ({platform.machine()}, {torch.get_num_threads()} of "
        f"{os.cpu_count()} cores)"
    )
    return (
        f"diffenc {__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}; "
        f"{hardware}; {seconds / 60:.1f} minutes."
    )


@contextmanager
def progress_bar(what: str = "scenes") -> Iterator[Progress | None]:
    """A bar that counts on a terminal, nothing anywhere else."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TextColumn(what),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def work_bar() -> Iterator[Callable[[float, float, str], None] | None]:
    """A bar that names what is being done on a terminal, nothing anywhere else."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeLeft(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("looking at what is there", total=None)

        def tell(done: float, total: float, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield tell


def say_written(paths: Mapping[str, Path]) -> None:
    """Name the files."""
    typer.echo(f"wrote {', '.join(map(str, paths.values()))}")
