"""The commands of `diffenc evaluate` that ask a model: file of answers, bars, report."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffenc.cli.fields import summary_of, with_fields
from diffenc.cli.files import check_output
from diffenc.cli.options import (
    MINIATURE_NOTE,
    AsJson,
    Debug,
    begin_anew,
    kept_output,
    quiet_libraries,
)
from diffenc.cli.progress import progress_bar
from diffenc.cli.tables import print_tables
from diffenc.errors import OutputError
from diffenc.evals.task import AskOptions, AskTask, Outcome
from diffenc.storage.names import exists
from diffenc.storage.writing import locked, reporting

if TYPE_CHECKING:
    from diffenc.evals.inspection import Progress

_ANSWER = b'{"type": "answer"'

ModelFolder = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Folder that diffenc train or DiffusionVLM.save_pretrained wrote, or checkpoint of "
        "LLaVA with a tower of diffenc.",
    ),
]
Output = Annotated[
    Path | None,
    kept_output(
        "FILE.jsonl",
        "File that gets every answer as it comes",
        "-results.jsonl, or -captions.jsonl with another --question",
        "answers",
    ),
]
Anew = Annotated[bool, begin_anew("answers in the file")]


def add_asking(app: typer.Typer, kind: type[AskTask]) -> None:
    """Add the command of a benchmark that a model answers."""
    command = with_fields(_run, {"task": kind, "options": AskOptions}, without=kind.without)
    app.command(kind.name, help=summary_of(kind))(command)


def _run(
    model: ModelFolder,
    task: AskTask,
    options: AskOptions,
    output: Output = None,
    as_json: AsJson = False,
    force: Anew = False,
    _debug: Debug = False,
) -> None:
    file = output or task.file
    check_output(file, suffixes=(".jsonl",), force=True)
    quiet_libraries()
    from diffenc.evals.run import prepare_task

    ask = prepare_task(task, model, options)
    with _answers(file, task.parts, force=force) as progress:
        outcome = ask(file, progress)
    if as_json:
        typer.echo(json.dumps(outcome.content, indent=1, ensure_ascii=False))
        return
    _report(outcome, file, miniature=task.miniature)


@contextmanager
def _answers(file: Path, parts: tuple[str, ...], *, force: bool) -> "Iterator[Progress | None]":
    """A bar over the parts of the protocol, while the file of answers is written.

    Where nothing was answered the file is as it was before, also with --force.
    """
    old = file.with_name(f".{file.name}.old")
    alone = partial(locked, file.parent, name=file.name, purpose="writing answers to it")
    if force and exists(file):
        with alone(), reporting(file):
            file.replace(old)
    new = not exists(file)
    try:
        with progress_bar(*parts, unit="answers") as progress:
            yield progress
    except KeyboardInterrupt:
        again = " without --force" if force else ""
        typer.echo(
            f"interrupted; what was answered is in {file}, and the same command{again} goes on",
            err=True,
        )
        raise typer.Abort from None
    finally:
        with suppress(OutputError), alone(), reporting(file):  # else it is another program's
            if new and not _has_answers(file):
                file.unlink(missing_ok=True)
                if force and exists(old):
                    old.replace(file)
            elif force:
                old.unlink(missing_ok=True)


def _has_answers(file: Path) -> bool:
    if not exists(file):
        return False
    with file.open("rb") as lines:
        return any(line.startswith(_ANSWER) for line in lines)


def _report(outcome: Outcome, file: Path, *, miniature: bool) -> None:
    print_tables(outcome.tables, outcome.notes)
    if outcome.fresh < outcome.count:
        known = outcome.count - outcome.fresh
        typer.echo(f"{known} of {outcome.count} answers were there already")
    if miniature:
        typer.echo(MINIATURE_NOTE)
    typer.echo(f"answers are in {file}")
