"""Features of many pictures to a folder of shards: decoded, computed and written at once."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from diffenc.checks.arguments import whole
from diffenc.errors import ConfigError, ImageError, OutputError
from diffenc.extraction.extractor import Extractor
from diffenc.extraction.filling import decoded_pictures, fill
from diffenc.extraction.index import require_parquet, write_index
from diffenc.extraction.listing import Listing, check_apart, list_pictures, missing_files
from diffenc.extraction.plan import (
    SKIPPED_FILE,
    begin,
    check_folder,
    make_plan,
    run_digest,
    trained_digest,
)
from diffenc.extraction.reader import FeatureFolder, open_features
from diffenc.extraction.rows import Shapes, row_bytes
from diffenc.extraction.shards import Shard, ShardTable, read_table, shard_name
from diffenc.inputs.images import describe_broken
from diffenc.storage.names import StrPath, checked_path
from diffenc.storage.writing import locked, make_folder, remove_file, write_text

SHARD_BYTES = 2**28
"""Size of the features of a shard, in bytes, that is not exceeded by default."""

MOST_IN_SHARD = 1000
"""Number of pictures in a shard that is not exceeded by default."""

Progress = Callable[[int, int], None]
"""Function that is called with the number of pictures done and the number of all."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a run will write, told before it begins.

    Attributes:
        pictures: Number of all pictures.
        done: Number of pictures that an earlier, unfinished run has dealt with.
        left_alone: Number of files of the source that are no pictures by their names.
        shapes: Shape of a picture's row and its dtype, by name of the tensor; None where pictures
            keep their own sizes.
        shards: Number of shards.
        shard_size: Number of pictures in each but the last.
        free: Bytes that are free where the folder lies.
    """

    pictures: int
    done: int
    left_alone: int
    shapes: Shapes | None
    shards: int
    shard_size: int
    free: int

    @property
    def picture_bytes(self) -> int | None:
        """Size of a picture's features in bytes; None where pictures keep their own sizes."""
        return None if self.shapes is None else row_bytes(self.shapes)

    @property
    def needed(self) -> int | None:
        """Bytes that are still to be written; None where pictures keep their own sizes."""
        each = self.picture_bytes
        return None if each is None else each * (self.pictures - self.done)


def write_features(
    source: "StrPath | Sequence[StrPath] | Listing",
    folder: StrPath,
    extractor: Extractor,
    *,
    id_column: str | None = None,
    shard_size: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    announce: Callable[[Outlook], None] | None = None,
) -> FeatureFolder:
    """Write features of many pictures to a folder, and go on where an earlier run was stopped.

    Threads decode pictures while the model computes, and another one writes what is complete. A
    shard is there whole or not at all; after an interruption, however hard, the same call goes on
    with the first shard that is missing. `index.parquet` is written last.

    Args:
        source: A folder, a list or an archive of pictures, paths of pictures, or a `Listing`; see
            `list_pictures`. The extractor names the columns of a list.
        folder: Folder to write to: new, empty, or one of the same run.
        extractor: What is read from the pictures, and with how many threads.
        id_column: Name of a list's column with a name for each picture; None takes the path.
        shard_size: Number of pictures per shard; None takes as many as fit 256 MiB, and 1,000 at
            most.
        overwrite: Whether to begin anew where the folder holds features.
        progress: Function that is called with the number of pictures done and that of all.
        announce: Function that is told what will be written before the first picture is read.

    Returns:
        The folder, opened.

    Raises:
        ConfigError: There are no pictures, or two of one name; the source or an option is wrong; or
            the extractor reads texts that the source does not have, or none where it has them.
        ImageError: A picture cannot be read, and broken ones are not to be skipped; or none can.
            What was done stays.
        OutputError: The folder holds other features or is in use, or cannot be written.
        MissingExtraError: pyarrow is not installed.
        DiffencError: See `DiffusionEncoder.from_pretrained` and `extract`.
    """
    require_parquet()
    target = checked_path("a folder of features", folder, error=OutputError)
    if shard_size is not None:
        whole("shard_size", shard_size, least=1)
    check_folder(target, overwrite=overwrite)
    listing = source if isinstance(source, Listing) else _listed(source, extractor, id_column)
    check_apart(listing)
    _check_prompts(listing, extractor)
    if not extractor.skip_broken:
        _refuse_missing(listing)
    shapes = extractor.row_shapes
    size = shard_size or _shard_size(shapes, extractor.batch_size)
    plan = make_plan(extractor, listing, shard_size=size, trained=trained_digest(extractor.encoder))
    make_folder(target)
    with locked(target, purpose="writing features to it"):
        begun = begin(target, plan, overwrite=overwrite)
        run = _Run(target, listing, extractor, size, run_digest(begun))
        missing = run.missing()
        done = len(listing) - sum(len(run.places(number)) for number in missing)
        if announce is not None:
            free = shutil.disk_usage(target).free
            announce(
                Outlook(len(listing), done, listing.left_alone, shapes, run.shards, size, free)
            )
        run.write(missing, done, progress)
        run.finish()
    return open_features(target)


def _listed(
    source: "StrPath | Sequence[StrPath]", extractor: Extractor, id_column: str | None
) -> Listing:
    return list_pictures(
        source,
        prompt_column=extractor.prompt_column,
        image_column=extractor.image_column,
        id_column=id_column,
    )


def _check_prompts(listing: Listing, extractor: Extractor) -> None:
    """Refuse texts that the extractor would not read, and one that reads what is not there."""
    column = extractor.prompt_column
    if (listing.prompts is None) == (column is None):
        return
    if column is None:
        raise ConfigError(
            "the listing has a text for each picture, and the extractor reads none of them: make "
            "it with prompt_column=, or list the pictures without"
        )
    raise ConfigError(
        f"the extractor reads the texts of {column!r}, and the listing has none: list the "
        f"pictures with list_pictures(..., prompt_column={column!r})"
    )


def _refuse_missing(listing: Listing) -> None:
    """Name the files that are not there, before a model is loaded."""
    if missing := missing_files(listing):
        hint = "; --skip-broken (skip_broken=True) goes on without them"
        raise ImageError(describe_broken(missing.values(), len(listing)) + hint)


def _shard_size(shapes: Shapes | None, batch_size: int) -> int:
    """Pictures per shard, whole batches where there is more than one."""
    each = 1 if shapes is None else row_bytes(shapes)
    most = max(1, min(MOST_IN_SHARD, SHARD_BYTES // max(1, each)))
    return most // batch_size * batch_size or most


@dataclass(frozen=True, slots=True)
class _Run:
    """A run that writes shards.

    Attributes:
        folder: Folder that is written to.
        listing: All pictures.
        extractor: What is read from them.
        size: Number of pictures per shard.
        digest: Digest of the plan, which all shards bear.
    """

    folder: Path
    listing: Listing
    extractor: Extractor
    size: int
    digest: str

    @property
    def shards(self) -> int:
        return -(-len(self.listing) // self.size)

    def places(self, number: int) -> range:
        """Places of the pictures of a shard."""
        return range(number * self.size, min((number + 1) * self.size, len(self.listing)))

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there, or not whole."""
        return [n for n in range(self.shards) if read_table(self._path(n), self.digest) is None]

    def _path(self, number: int) -> Path:
        return self.folder / shard_name(number)

    def write(self, numbers: Sequence[int], done: int, progress: Progress | None) -> None:
        """Write shards: one is written by a thread while the next is computed.

        Raises:
            ImageError: A picture is broken and not to be skipped. Shards before it are written.
        """

        def step(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, len(self.listing))

        places = (place for number in numbers for place in self.places(number))
        decoded = decoded_pictures(self.listing, self.extractor, places)
        # At its end the pool waits, so that a shard that is complete is written in any case.
        with closing(decoded), ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
            writing: Future[None] | None = None
            for number in numbers:
                own = self.places(number)
                shard = Shard(len(own), self.digest, prompted=self.listing.prompts is not None)
                try:
                    fill(shard, decoded, len(own), self.listing, self.extractor, step)
                except ImageError as error:
                    raise ImageError(
                        f"{error}; {own.start} of {len(self.listing)} pictures are done and stay: "
                        "mend the picture and repeat the call, or go on without it by "
                        "--skip-broken (skip_broken=True)"
                    ) from error
                if writing is not None:
                    writing.result()
                writing = pool.submit(shard.write, self._path(number))
                del shard  # else two are held while a third is filled
            if writing is not None:
                writing.result()

    def finish(self) -> None:
        """Write the report and the index, and find out whether there are any features."""
        left_out: list[tuple[str, str]] = []

        def tables() -> Iterator[ShardTable]:
            kept = 0
            for number in range(self.shards):
                table = read_table(self._path(number), self.digest)
                if table is None:
                    raise OutputError(
                        f"{self._path(number)} is gone: another program changes the folder; "
                        "repeat the call"
                    )
                left_out.extend(table.skipped)
                kept += len(table.ids)
                yield table
            if not kept:
                reasons = (why for _, why in left_out)
                raise ImageError(describe_broken(reasons, len(self.listing)))

        remove_file(self.folder / SKIPPED_FILE)
        write_index(self.folder, tables())
        if left_out:
            lines = [
                json.dumps({"id": name, "reason": why}, ensure_ascii=False)
                for name, why in left_out
            ]
            write_text(self.folder / SKIPPED_FILE, "\n".join(lines) + "\n")
