"""Options of the commands under `diffenc study`."""

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="FOLDER", help="Gets the study's .md, .json and picture; is made."
    ),
]
Backbone = Annotated[
    str,
    typer.Option(
        "--backbone",
        "--model",
        "-b",
        "-m",
        metavar="NAME",
        help="Alias, Hub id or diffusers folder; see diffenc info.",
    ),
]
Seeds = Annotated[int, typer.Option(help="Repetitions with other scenes and noise.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny: shows that it runs, and no more.")]
