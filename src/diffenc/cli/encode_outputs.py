"""What `diffenc encode` writes: one file of all features, or a folder of shards."""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffenc._version import __version__
from diffenc.cli.pictures import PictureFiles
from diffenc.cli.progress import progress_bar, progress_lines
from diffenc.cli.tables import print_table, readable_bytes
from diffenc.errors import ImageError

if TYPE_CHECKING:
    from diffenc.extraction.extractor import Extractor
    from diffenc.extraction.listing import Listing
    from diffenc.extraction.rows import Shapes
    from diffenc.extraction.shards import Shard
    from diffenc.extraction.writing import Outlook


def encode_to_file(
    listing: "Listing", extractor: "Extractor", output: Path, *, paths: Sequence[Path] | None
) -> None:
    """Write the features of all pictures to one file, from memory.

    Args:
        listing: Pictures.
        extractor: What is read from them.
        output: File that is written.
        paths: Files of the pictures, each of which is looked at before the model is loaded; None
            where they come from a folder, a list or an archive.
    """
    from diffenc.storage.tensors import write_tensors

    files = PictureFiles(paths or [], extractor.skip_broken)
    files.check()
    if files.broken:
        listing = _some(listing, files.kept)
    shard = _filled(listing, extractor)
    if not shard.table.ids:
        raise ImageError(shard.table.skipped[0][1])
    left_out = [*files.left_out, *(name for name, _ in shard.table.skipped)]
    metadata = _described(shard, extractor, left_out)
    # One entry: the order of several is random, and equal calls shall write equal files.
    write_tensors(output, shard.tensors, metadata={"diffenc": json.dumps(metadata)})
    rows = [
        (name, " x ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in shard.tensors.items()
    ]
    print_table("features", ("tensor", "shape", "dtype"), rows)
    _warn_of_cut(sum(count > 0 for count in shard.table.truncated))
    typer.echo(f"wrote {output} ({readable_bytes(output.stat().st_size)})")
    faults = [*files.broken.values(), *(why for _, why in shard.table.skipped)]
    _warn_of_broken(faults, len(faults) + len(shard.table.ids))


def _some(listing: "Listing", places: Sequence[int]) -> "Listing":
    """Some pictures of a listing."""
    prompts = listing.prompts
    return replace(
        listing,
        ids=[listing.ids[place] for place in places],
        picture=lambda place: listing.picture(places[place]),
        prompts=None if prompts is None else [prompts[place] for place in places],
    )


def _filled(listing: "Listing", extractor: "Extractor") -> "Shard":
    """One shard of all pictures, with a progress bar on a terminal."""
    from diffenc.extraction.filling import decoded_pictures, fill
    from diffenc.extraction.shards import Shard

    count, done = len(listing), 0
    shard = Shard(count, prompted=listing.prompts is not None)
    with (
        progress_bar("encoding", unit="images") as progress,
        closing(decoded_pictures(listing, extractor, range(count))) as decoded,
    ):

        def step(more: int) -> None:
            nonlocal done
            done += more
            if progress is not None and count > extractor.batch_size:
                progress(done, count)

        fill(shard, decoded, count, listing, extractor, step)
    return shard


def _described(shard: "Shard", extractor: "Extractor", left_out: Sequence[str]) -> dict[str, Any]:
    """What a file of features says of itself."""
    encoder, table = extractor.encoder, shard.table
    one = [] if extractor.prompt is None else [extractor.prompt]
    return {
        "version": __version__,
        "model": encoder.backbone.name,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "images": table.ids,
        "left_out": left_out,
        "prompts": one if table.prompts is None else table.prompts,
        "truncated": table.truncated,
        "conditioning": shard.conditioning,
        "grid": list(shard.grid),
        "taps": [asdict(tap) for tap in encoder.feature_info],
        "config": encoder.config.to_dict(),
        **({} if extractor.kept.registers else {"registers": False}),
        **({} if extractor.kept.pool is None else {"pool": extractor.kept.pool}),
        **({} if extractor.kept.word_tokens is None else {"words": table.words}),
    }


def encode_to_folder(
    listing: "Listing",
    extractor: "Extractor",
    folder: Path,
    *,
    shard_size: int | None,
    force: bool,
) -> None:
    """Write the features of pictures to a folder of shards, or go on with one.

    Args:
        listing: Pictures.
        extractor: What is read from them.
        folder: Folder that is written to.
        shard_size: Number of pictures per shard; None takes the default.
        force: Whether to begin anew where the folder holds features.
    """
    from diffenc.extraction.writing import write_features

    with progress_lines("encoding", unit="images") as progress:
        features = write_features(
            listing,
            folder,
            extractor,
            shard_size=shard_size,
            overwrite=force,
            progress=progress,
            announce=lambda outlook: _announce(outlook, folder),
        )
    _warn_of_cut(sum((count or 0) > 0 for count in features.table["truncated"].to_pylist()))
    written = sum(path.stat().st_size for path in folder.iterdir())
    typer.echo(f"wrote {folder} ({readable_bytes(written)}, {len(features):,} images)")
    if features.skipped:
        _warn_of_broken(list(features.skipped.values()), len(listing))
        typer.echo(f"all that were left out: {folder / 'skipped.jsonl'}", err=True)


def _announce(outlook: "Outlook", folder: Path) -> None:
    """Say how large the features will be, before the first picture is read."""
    if outlook.left_alone:
        typer.echo(
            f"note: {outlook.left_alone:,} other files are no pictures by their names", err=True
        )
    if outlook.shapes is not None:
        _print_shapes(outlook.shapes)
    each = outlook.picture_bytes
    total = "" if each is None else f": {readable_bytes(each * outlook.pictures)}"
    plural = "" if outlook.shards == 1 else "s"
    shards = f"{outlook.shards:,} shard{plural} of {outlook.shard_size:,}"
    typer.echo(f"{outlook.pictures:,} images in {shards}{total}")
    if outlook.done:
        typer.echo(f"going on with {folder}: {outlook.done:,} images are done", err=True)
    if outlook.needed is not None and outlook.needed > outlook.free:
        typer.echo(
            f"warning: {readable_bytes(outlook.free)} are free there, and "
            f"{readable_bytes(outlook.needed)} are still to be written; --pool mean, fewer --taps "
            "and --output-dtype float16 take less",
            err=True,
        )


def _print_shapes(shapes: "Shapes") -> None:
    from diffenc.extraction.rows import row_bytes

    rows = [
        (
            name,
            " x ".join(map(str, shape)),
            str(dtype).removeprefix("torch."),
            readable_bytes(row_bytes({name: (shape, dtype)})),
        )
        for name, (shape, dtype) in shapes.items()
    ]
    print_table("features of an image", ("tensor", "shape", "dtype", "size"), rows, right=("size",))


def _warn_of_cut(count: int) -> None:
    if count:
        typer.echo(
            f"warning: {count} prompts are longer than the text encoder reads and were cut; "
            "--long-prompts chunk reads all of them",
            err=True,
        )


def _warn_of_broken(faults: Sequence[str], total: int) -> None:
    from diffenc.inputs.images import describe_broken

    if faults:
        typer.echo(f"warning: {describe_broken(faults, total)}; left out", err=True)
