"""`diffenc look`: what questions do to the features of a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffenc.cli.fields import Changes, split_names, with_fields
from diffenc.cli.files import check_output, write_whole
from diffenc.cli.noted import command_line
from diffenc.cli.options import (
    DISCARD_HELP,
    Debug,
    Device,
    Dtype,
    Force,
    Model,
    Variant,
    quiet_libraries,
    to_device,
    to_dtype,
)
from diffenc.cli.parsing import parse_channels
from diffenc.cli.tables import print_table
from diffenc.config import EncoderConfig
from diffenc.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffenc.studies.look import Look

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_OPTIONS = (
    *("taps", "timestep", "draws", "size", "resize"),
    *("guidance_scale", "seed", "uncond", "reuse", "discard"),
)
_METAVARS = {"taps": "NAMES", "timestep": "T,T", "size": "PIXELS|HxW", "discard": "N,N|none"}


def _look(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="File of a picture.")],
    questions: Annotated[
        list[str] | None,
        typer.Option(
            "--question", "-q", metavar="TEXT", help="Question, repeated for several, side by side."
        ),
    ],
    changes: dict[str, Any],
    words: Annotated[
        bool, typer.Option("--words", help="Map where each word of each question is seen.")
    ] = False,
    some: Annotated[
        list[str] | None,
        typer.Option("--word", "-w", metavar="WORD", help="Map this word alone, repeated."),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Cross-attentions or blocks that words are read from; default those of each tap.",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File of the figure, such as a .png file."
        ),
    ] = Path("look.png"),
    registers: Annotated[
        bool,
        typer.Option(
            "--registers/--no-registers",
            help="Let register cells (lone cells of huge norm) take part in the colours.",
        ),
    ] = True,
    side: Annotated[int, typer.Option(min=64, help="Side of a panel in pixels.")] = 256,
    model: Model = "shapes",
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Taps and options of a method: mustafar, gdf, dift ..."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    variant: Variant = None,
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """Draw what questions do to the features of a picture.

    Features without a text and under each question as colours, their difference, how far each cell
    moves, and on request where each word is seen: at every tap and timestep, side by side.
    --guidance-scale adds a row of guided features.
    """
    check_output(output, suffixes=_SUFFIXES, force=force)
    if not questions:
        raise PromptError("got no question; pass one or more with --question")
    from diffenc.inputs.images import load_image

    picture = load_image(image)
    quiet_libraries()
    from diffenc.encoder import DiffusionEncoder
    from diffenc.studies.look import look as look_at

    encoder = DiffusionEncoder.from_pretrained(
        model,
        device=to_device(device),
        dtype=to_dtype(dtype),
        preset=preset,
        variant=variant,
        **changes,
    )
    results = look_at(
        encoder,
        picture,
        questions,
        words=tuple(some) if some else words,
        layers=split_names(layers),
    )
    scale = changes.get("guidance_scale")
    drawn = results.figure(
        guidance_scale=scale,
        leave_out_registers=not registers,
        note=f"Model: {results.model}. Made by: {command_line()}",
        side=side,
    )
    write_whole(output, drawn.save)
    print_table(
        f"what the questions change in {results.model}",
        ("tap", "timestep", "question", "change", "largest", "at (row, column)", "registers"),
        list(_rows(results)),
        right=("timestep", "change", "largest", "registers"),
    )
    typer.echo(
        "change: length of f_c - f_u over the mean length of f_u, mean over cells, and the largest"
    )
    typer.echo(f"wrote {output}")


_CHANGES = Changes(
    EncoderConfig,
    _OPTIONS,
    _METAVARS,
    readers={"discard": parse_channels},
    helps={"discard": DISCARD_HELP},
)
look = with_fields(_look, {"changes": _CHANGES})


def _rows(results: "Look") -> "Iterator[tuple[str, ...]]":
    for tap in results.taps:
        change = results.change(tap)
        height, width = change.shape[2:]
        for index, timestep in enumerate(results.timesteps):
            count = int(results.registers[tap][index].sum())
            for number, question in enumerate(results.questions):
                cells = change[number, index]
                row, column = divmod(int(cells.argmax()), width)
                yield (
                    tap,
                    str(timestep),
                    question,
                    f"{float(cells.mean()):.3f}",
                    f"{float(cells.max()):.3f}",
                    f"{row}, {column} of {height} x {width}",
                    str(count),
                )
