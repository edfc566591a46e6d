"""Progress of long work: a bar on a terminal, nothing anywhere else."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


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
