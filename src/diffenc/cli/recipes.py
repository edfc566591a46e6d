"""`diffenc recipes`: the paper's trainings as TOML files for `diffenc train`."""

from pathlib import Path
from typing import Annotated

import typer

from diffenc.cli.files import check_output
from diffenc.cli.options import Debug
from diffenc.cli.tables import print_table
from diffenc.errors import ConfigError
from diffenc.storage.writing import make_folder, write_text


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Training whose TOML is printed; default: a list."),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write NAME.toml, and those it begins with, to a folder; without NAME all.",
        ),
    ] = None,
    shapes: Annotated[
        bool,
        typer.Option(
            "--shapes", help="The same trainings in miniature, on data of diffenc shapes-data."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace files that exist in the folder.")
    ] = False,
    _debug: Debug = False,
) -> None:
    """List the paper's trainings, or give one as TOML to edit and train."""
    if force and write is None:
        raise ConfigError("--force belongs to --write")
    from diffenc.mllm.recipes import Recipe, chain, recipes

    def sized(each: Recipe) -> Recipe:
        return each.in_miniature() if shapes else each

    chosen = list(recipes().values()) if name is None else chain(name)
    if write is not None:
        make_folder(write)
        texts = {write / f"{each.name}.toml": sized(each).to_toml() for each in chosen}
        for path in texts:
            check_output(path, suffixes=(".toml",), force=force)
        for path, text in texts.items():
            write_text(path, text)
        typer.echo(f"wrote {', '.join(map(str, texts)) if name else f'{len(texts)} files'}")
    elif name is not None:
        typer.echo(sized(chosen[-1]).to_toml(), nl=False)
    else:
        rows = [(each.name, each.start or "-", each.paper) for each in chosen]
        print_table("trainings of the paper", ["name", "begins with", "rows"], rows)
