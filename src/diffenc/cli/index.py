"""`diffenc index` and `diffenc search`: images once, then any text without them."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from diffenc.cli.options import (
    Debug,
    Device,
    Dtype,
    Model,
    quiet_libraries,
    to_device,
    to_dtype,
)
from diffenc.cli.score_options import (
    AsJson,
    BatchSize,
    CalibrationOption,
    Layers,
    References,
    ResizeOption,
    Seed,
    Size,
    Texts,
    Timesteps,
    load_scorer,
)
from diffenc.cli.tables import print_table, readable_bytes


def index(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Picture files.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Of the bank, new or empty.")
    ] = Path("bank"),
    model: Model = "shapes",
    calibration: CalibrationOption = None,
    references: References = None,
    timesteps: Timesteps = None,
    layers: Layers = None,
    size: Size = None,
    resize: ResizeOption = None,
    seed: Seed = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "float32",
    _debug: Debug = False,
) -> None:
    """Write a query bank of images, which diffenc search finds by any text.

    One pass per image and timestep; the size of the bank is told before it is written. Few layers
    and timesteps make it small.
    """
    from diffenc.images import load_image

    for image in images:
        load_image(image)
    scorer = load_scorer(
        model,
        device=device,
        dtype=dtype,
        preset="calibrated",
        calibration=calibration,
        references=references,
        timesteps=timesteps,
        layers=layers,
        size=size,
        mode="shared-query",
        resize=resize,
        seed=seed,
        batch_size=batch_size,
    )
    typer.echo(
        f"{len(images)} images, {len(scorer.layers)} layers, {len(scorer.config.steps)} timesteps: "
        f"{readable_bytes(scorer.index_bytes(len(images)))}"
    )
    from rich.console import Console
    from rich.progress import Progress

    quiet = not sys.stderr.isatty()
    progress = Progress(console=Console(stderr=True), disable=quiet, transient=True)
    task = progress.add_task("reading", total=len(images))
    with nullcontext() if quiet else progress:  # rich before 15 ends even a disabled one's line
        scorer.build_index(
            [str(image) for image in images],
            output,
            progress=lambda done: progress.update(task, completed=done),
        )
    written = sum(path.stat().st_size for path in output.iterdir())
    typer.echo(f"wrote {output} ({readable_bytes(written)})")


def search(
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="A folder of diffenc index.")],
    texts: Texts,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Images per text.")] = 5,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="Default: the one the bank names."),
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
    found = opened.search(texts, top=top)
    if as_json:
        content = {
            text: [{"name": r.name, "index": r.index, "score": r.score} for r in results]
            for text, results in zip(texts, found, strict=True)
        }
        typer.echo(json.dumps(content, indent=2))
        return
    for text, results in zip(texts, found, strict=True):
        rows = [(place, r.name, f"{r.score:.4f}") for place, r in enumerate(results, start=1)]
        print_table(text, ("", "image", "score"), rows, right=("", "score"))
