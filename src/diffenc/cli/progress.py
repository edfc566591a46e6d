"""Progress of long work: a bar on a terminal, nothing anywhere else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(
    title: str, *others: str, unit: str
) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with the time left on a terminal, nothing anywhere else.

    What is done when the bar is told for the first time does not count for the speed.

    Args:
        title: Name of the first piece of work.
        others: Names of the pieces of work after it; each begins when the one before is complete.
        unit: Name of the things that are counted, in the plural.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        titles = [title, *others]
        tasks: list[Any] = []

        def update(done: int, total: int) -> None:
            if not tasks or bar.tasks[-1].finished:
                name = titles[min(len(tasks), len(titles) - 1)]
                tasks.append(bar.add_task(name, total=total, completed=done))
            bar.update(tasks[-1], completed=done)

        yield update
