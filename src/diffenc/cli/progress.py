"""Progress of long work: a bar on a terminal, nothing anywhere else."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import typer

_LINE_SECONDS = 30.0


class Progress(Protocol):
    """Function that is called with the work done, all work and, where it changes, its name."""

    def __call__(self, done: float, total: float, title: str = "", /) -> None:
        """Show it."""


@contextmanager
def progress_bar(title: str, *others: str, unit: str | Sequence[str]) -> Iterator[Progress | None]:
    """A bar with the time left on a terminal, nothing anywhere else.

    What is done when the bar is told for the first time does not count for the speed.

    Args:
        title: Name of the first piece of work.
        others: Names of the pieces of work after it; each begins when the one before is complete.
        unit: Name of the things that are counted, in the plural, for all pieces or for each; "" for
            all shows a percentage.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        MofNCompleteColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    units = [unit] if isinstance(unit, str) else list(unit)
    numbers = (MofNCompleteColumn(), TextColumn("{task.fields[unit]}"))
    counts = numbers if any(units) else (TaskProgressColumn(),)
    columns = (*Bars.get_default_columns()[:2], *counts, TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bar:
        titles = [title, *others]
        tasks: list[Any] = []

        def update(done: float, total: float, title: str = "", /) -> None:
            if not tasks or bar.tasks[-1].finished:
                name, counted = (each[min(len(tasks), len(each) - 1)] for each in (titles, units))
                tasks.append(bar.add_task(name, total=total, completed=int(done), unit=counted))
            bar.update(tasks[-1], completed=done, description=title or None)

        yield update


@contextmanager
def progress_lines(title: str, *, unit: str) -> Iterator[Progress]:
    """A bar on a terminal; anywhere else, as in a log, a line on standard error now and then.

    Args:
        title: Name of the work.
        unit: Name of the things that are counted, in the plural.
    """
    with progress_bar(title, unit=unit) as bar:
        if bar is not None:
            yield bar
            return
        begun: tuple[float, float] | None = None
        last = time.monotonic()

        def say(done: float, total: float, _title: str = "", /) -> None:
            nonlocal begun, last
            now = time.monotonic()
            begun = begun or (now, done)
            if now - last < _LINE_SECONDS:
                return
            last = now
            speed = (done - begun[1]) / max(now - begun[0], 1e-9)
            rest = f", {(total - done) / speed / 60:,.0f} minutes left" if speed else ""
            line = f"{title}: {done:,.0f} of {total:,.0f} {unit}, {speed:,.1f} a second{rest}"
            typer.echo(line, err=True)

        yield say
