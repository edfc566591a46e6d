"""`diffenc maps`: where in an image the words of a text are seen."""

from pathlib import Path
from typing import Annotated, Any

import typer

from diffenc.cli.fields import split_names, with_fields
from diffenc.cli.files import check_output, write_whole
from diffenc.cli.options import Debug, Device, Dtype, Force, Model, Variant
from diffenc.cli.parsing import parse_heads
from diffenc.cli.scorers import load_scorer, scorer_changes
from diffenc.cli.tables import print_table

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SHARE = "Share of each cell's attention that the word gets"
_MEANINGS = {
    "concept-attention": "Share of each cell that the concept gets among the concepts",
    "daam": "Sum over timesteps of the share of each cell's attention that the word gets, mean "
    "over its pieces",
}


def _maps(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="File of a picture.")],
    text: Annotated[
        str, typer.Option("--text", "-t", metavar="TEXT", help="Text whose words are drawn.")
    ],
    changes: dict[str, Any],
    words: Annotated[
        list[str] | None,
        typer.Option(
            "--word",
            "-w",
            metavar="WORD",
            help="Word of the text that is drawn, repeated; default all. A concept for "
            "concept-attention, which need not stand in the text.",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File of the figure, such as a .png file."
        ),
    ] = Path("maps.png"),
    model: Model = "shapes",
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="daam, for SD 3 seg4diff, for FLUX and SD 3 concept-attention: their definitions.",
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Cross-attentions or blocks, with commas or repeated: mid_block, up_blocks.1.",
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Attention heads that count, with commas; default all."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    variant: Variant = None,
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """Draw where each word of a text is seen in an image.

    Each word has a range of colours of its own, which the figure states: compare places, not words.
    """
    check_output(output, suffixes=_SUFFIXES, force=force)
    from diffenc.inputs.images import load_image

    picture = load_image(image)
    from diffenc.models import describe

    base = "diffusion-classifier" if describe(model).joins_text else "paper"
    scorer = load_scorer(model, changes, device=device, dtype=dtype, preset=base, variant=variant)
    heat_maps = scorer.word_maps(
        picture,
        text,
        words or None,
        preset=preset,  # type: ignore[arg-type]  # checked there
        layers=split_names(layers),
        timesteps=changes.get("timesteps"),
        heads=None if heads is None else parse_heads(heads),
    )
    drawn = heat_maps.to_pil(
        title=text,
        note=f"Model: {scorer.backbone.name}. {_MEANINGS.get(preset or '', _SHARE)}, each word in "
        "its own range. Made by: diffenc maps",
    )
    write_whole(output, drawn.save)
    print_table(
        f"maps of {scorer.backbone.name}",
        ("word", "cells", "lowest", "highest"),
        [
            (word, " x ".join(map(str, heat.array.shape)), f"{heat.low:.4g}", f"{heat.high:.4g}")
            for word, heat in heat_maps.items()
        ],
        right=("lowest", "highest"),
    )
    typer.echo(f"wrote {output}")


maps = with_fields(_maps, {"changes": scorer_changes("timesteps", "size", "resize", "seed")})
