"""`diffenc index` and `diffenc search`: images once, then any text without them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from diffenc.cli.fields import with_fields
from diffenc.cli.options import (
    AsJson,
    Debug,
    Device,
    Dtype,
    Model,
    SkipBroken,
    Variant,
    quiet_libraries,
    to_device,
    to_dtype,
)
from diffenc.cli.pictures import PictureFiles
from diffenc.cli.progress import progress_bar
from diffenc.cli.scorers import References, Texts, load_scorer, scorer_changes
from diffenc.cli.tables import print_table, readable_bytes


def _index(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Files of pictures.")],
    changes: dict[str, Any],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder of the bank: new, empty, or one where this command was interrupted.",
        ),
    ] = Path("bank"),
    model: Model = "shapes",
    references: References = None,
    skip_broken: SkipBroken = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Begin anew where the folder holds a bank.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    variant: Variant = None,
    _debug: Debug = False,
) -> None:
    """Write a query bank of images, which diffenc search finds by any text.

    One pass per image and timestep; the size of the bank is told before it is written. Few layers
    and timesteps make it small. After an interruption the same command goes on where it stopped.
    """
    from diffenc.scoring.bank_plan import check_folder, is_begun

    check_folder(output, overwrite=force)
    PictureFiles(references or ()).check()
    if not skip_broken:  # what cannot be read is told before the model is loaded
        PictureFiles(images).check()
    scorer = load_scorer(
        model,
        {**changes, "mode": "shared-query"},
        device=device,
        dtype=dtype,
        preset="calibrated",
        variant=variant,
        references=references,
    )
    typer.echo(
        f"{len(images)} images, {len(scorer.layers)} layers, {len(scorer.config.steps)} timesteps: "
        f"{readable_bytes(scorer.index_bytes(len(images)))}"
    )
    goes_on = is_begun(output) and not force
    with progress_bar("reading", unit="images") as show:

        def report(done: int) -> None:
            nonlocal goes_on
            if goes_on and done:
                typer.echo(f"going on with {output}: {done} images are in it", err=True)
            goes_on = False
            if show is not None:
                show(done, len(images))

        bank = scorer.build_index(
            [str(image) for image in images],
            output,
            skip_broken=skip_broken,
            overwrite=force,
            progress=report,
        )
    for name, why in bank.skipped:
        typer.echo(f"left out {name}: {why}", err=True)
    written = sum(path.stat().st_size for path in output.iterdir())
    left_out = f", {len(bank.skipped)} images left out" if bank.skipped else ""
    typer.echo(f"wrote {output} ({readable_bytes(written)}){left_out}")


_CHANGES = ("calibration", "timesteps", "layers", "size", "resize", "seed", "batch_size")
index = with_fields(_index, {"changes": scorer_changes(*_CHANGES)})


def search(
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="Folder that diffenc index wrote.")],
    texts: Texts,
    top: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of images shown per text.")
    ] = 5,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="Model that reads the text; default the one that the bank names.",
        ),
    ] = None,
    as_json: AsJson = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    _debug: Debug = False,
) -> None:
    """Find the images of a bank that fit a text best; the images are not needed."""
    quiet_libraries()
    from diffenc.scoring.query_bank import QueryBank

    opened = QueryBank.load(bank, backbone=model, device=to_device(device), dtype=to_dtype(dtype))
    hits = opened.search(texts, top=top)
    if as_json:
        content = {
            text: [{"name": r.name, "index": r.index, "score": r.score} for r in results]
            for text, results in zip(texts, hits, strict=True)
        }
        typer.echo(json.dumps(content, indent=2))
        return
    for text, results in zip(texts, hits, strict=True):
        rows = [(place, r.name, f"{r.score:.4f}") for place, r in enumerate(results, start=1)]
        print_table(text, ("", "image", "score"), rows, right=("", "score"))
