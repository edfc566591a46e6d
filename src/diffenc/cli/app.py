"""The commands of the program `diffenc`, and how errors reach the terminal."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffenc._version import __version__
from diffenc.cli import signals
from diffenc.cli.demo import demo
from diffenc.cli.encode import encode
from diffenc.cli.evaluate import evaluate
from diffenc.cli.index import index, search
from diffenc.cli.info import info
from diffenc.cli.look import look
from diffenc.cli.maps import maps
from diffenc.cli.noted import NotedCommand
from diffenc.cli.options import DEBUG, Debug
from diffenc.cli.recipes import recipes
from diffenc.cli.score import score
from diffenc.cli.serve import serve
from diffenc.cli.study import study
from diffenc.cli.train import shapes_data, train
from diffenc.errors import DiffencError


class CommandGroup(TyperGroup):
    """Commands whose errors are one line on standard error, and a traceback only with --debug."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, report and exit: 2 for what the caller can repair, 1 for anything unforeseen."""
        DEBUG.off()
        if not (sys.argv[1:] if args is None else args):
            args = ["--help"]
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.Abort as error:
            cause = error.__cause__
            code = _report(cause) if isinstance(cause, EOFError) else 130
        except Exception as error:
            if signals.received:  # what an interruption became on its way through other code
                code = signals.exit_code()
            elif DEBUG.on:
                raise
            else:
                code = _report(error)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Read the command line, and print help where that is asked for."""
        with _reader_may_leave():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _reader_may_leave():
            return super().invoke(ctx)


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """End without a word where nobody reads standard output any more, as after `head`."""
    try:
        yield
    except BrokenPipeError:
        raise typer.Exit(signals.BROKEN_PIPE) from None


def _report(error: Exception) -> int:
    """Print an error as one line; the exit code."""
    if isinstance(error, DiffencError):
        message, code = str(error), 2
    elif hasattr(error, "format_message"):  # a usage error: click's own, or typer's copy of it
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "diffenc"
        usage = error.format_message().rstrip(".")
        mark = "" if usage.endswith("?") else "."
        message, code = f"{usage}{mark} See: {command} --help", 2
    else:
        message = f"{type(error).__name__}: {error} (unforeseen; --debug shows the traceback)"
        code = 1
    typer.echo(f"error: {' '.join(map(str.strip, message.splitlines()))}", err=True)
    return code


app = typer.Typer(
    name="diffenc",
    cls=CommandGroup,
    help="Text-to-image diffusion models as vision encoders that read the question.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> bool:
    if requested:
        typer.echo(f"diffenc {__version__}")
        raise typer.Exit
    return requested


@app.callback()
def _global_options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    _debug: Debug = False,
) -> None:
    """Options before a command."""


app.command("demo")(demo)
app.command("encode")(encode)
app.command("info")(info)
app.command("score")(score)
app.command("maps")(maps)
app.command("look", cls=NotedCommand)(look)
app.command("app")(serve)
app.command("index")(index)
app.command("search")(search)
app.command("train")(train)
app.command("recipes")(recipes)
app.command("shapes-data")(shapes_data)
app.add_typer(evaluate, name="evaluate")
app.add_typer(study, name="study")
