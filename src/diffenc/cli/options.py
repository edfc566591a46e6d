"""Options that several commands share."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch


class _Switch:
    """Whether tracebacks are wanted, known before the command runs."""

    on = False

    def turn(self, on: bool) -> bool:
        self.on = self.on or on
        return on

    def off(self) -> None:
        self.on = False


DEBUG = _Switch()

Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=DEBUG.turn, is_eager=True, help="Show a traceback when something fails."
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="Alias, Hub id, diffusers folder or .safetensors checkpoint; see diffenc info.",
    ),
]
Device = Annotated[
    str,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps; auto is cuda where there is one."),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Floating point type of the weights: float32, float16 or bfloat16, or fp32, fp16 or "
        "bf16.",
    ),
]
SkipBroken = Annotated[
    bool,
    typer.Option(
        "--skip-broken", help="Go on without pictures that cannot be read, and tell which."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Variant = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="Word in the names of the weight files, such as fp16; default: what fits the dtype.",
    ),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace the output file if it exists.")]


def kept_output(metavar: str, gets: str, ending: str, holds: str) -> Any:
    """Declare `--output` of a run that is gone on with by the same command.

    Args:
        metavar: Word that stands for the place in the help.
        gets: Kind of the place and what it gets, for the help.
        ending: Ending of the default, behind the command's name.
        holds: What the place holds of a run.
    """
    return typer.Option(
        "--output",
        "-o",
        metavar=metavar,
        help=f"{gets}; default the command's name and {ending}. Where it holds {holds} of the same "
        "run, that run goes on.",
    )


def begin_anew(what: str) -> Any:
    """Declare `--force` of a run that would otherwise be gone on with."""
    return typer.Option("--force", "-f", help=f"Forget the {what} and begin anew.")


DISCARD_HELP = (
    "Channels of a block's input that are zeroed before the adaptive norm that is tapped, such as "
    "single_transformer_blocks.9.norm of FLUX; draws are then averaged before the norm, as DiTF "
    "has it. The word none zeroes no channel, for a preset that names some. Default: what the "
    "preset says, or norms as they are."
)
"""Help of `--discard`."""

MINIATURE_NOTE = "The items are coloured shapes of 64 pixels; they say nothing of photographs."


def to_dtype(name: str) -> "torch.dtype":
    """The dtype of that name, see `named_dtype`."""
    from diffenc.models.device import named_dtype

    return named_dtype(name)


def to_device(name: str) -> "torch.device":
    """The device of that name, see `named_device`."""
    from diffenc.models.device import named_device

    return named_device(name)


def quiet_libraries() -> None:
    """Keep progress bars and notices of the libraries behind the models off the terminal."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()
