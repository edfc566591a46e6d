"""A look at every picture of a benchmark before a model answers for hours."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from PIL import Image

from diffenc.errors import ConfigError, ImageError
from diffenc.evals.answering.base import Reading
from diffenc.evals.base import Picture, Problem
from diffenc.evals.inspection import NAMED, Progress, summary
from diffenc.inputs.pictures.files import read_picture

Item = TypeVar("Item")


def whole_items(
    items: Sequence[Item],
    pictures: Callable[[Item], Sequence[Picture]],
    *,
    source: str,
    problems: Sequence[Problem],
    skip_broken: bool,
    otherwise: str,
    keep: Callable[[Sequence[Item]], Sequence[Item]] = tuple,
) -> tuple[tuple[Item, ...], Reading]:
    """Keep the items all of whose pictures can be read, and report on the others.

    Args:
        items: Items of a benchmark.
        pictures: Function that returns the pictures of an item.
        source: Origin of the items, named in error messages.
        problems: Problems that were found when the tables were read.
        skip_broken: Whether broken items are left out, instead of raising an error.
        otherwise: Description of what is missing if no item is left, such as "picture that can be
            captioned"; part of the error message.
        keep: Function that selects the items that count among those that can be read.

    Raises:
        ConfigError: There are problems and they are not to be skipped, or no item is left.
    """
    reading = read_pictures(
        [picture for item in items for picture in pictures(item)],
        source=source,
        problems=problems,
        skip_broken=skip_broken,
    )
    whole = tuple(keep([item for item in items if reading.whole(pictures(item))]))
    if not whole:
        raise ConfigError(f"{source} has no {otherwise}")
    return whole, reading


def read_pictures(
    pictures: Sequence[Picture],
    *,
    source: str,
    problems: Sequence[Problem] = (),
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> Reading:
    """Open each picture once, and refuse what is broken, all of it in one message.

    Args:
        pictures: Pictures of all items; one that several items share is opened once.
        source: Origin of the pictures, named in the error message.
        problems: Problems that were found when the tables were read.
        skip_broken: Whether broken items are left out, instead of raising an error.
        progress: Function that is called with the number of pictures read so far and the number of
            all pictures; None reports nothing.

    Raises:
        ConfigError: There are problems and they are not to be skipped.
    """
    found = list(problems)
    digests: dict[str, str] = {}
    different = {picture.name: picture for picture in pictures}
    for done, (name, picture) in enumerate(different.items(), start=1):
        try:
            digests[name] = picture.read()[1]
        except ImageError as error:
            detail = str(error).removeprefix(f"cannot read the image {name}: ")
            found.append(Problem("unreadable pictures", name, detail))
        if progress is not None:
            progress(done, len(different))
    if found and not skip_broken:
        raise ConfigError(
            f"{source} has {len(found)} problems: {summary(found, NAMED)}. Mend them, or go on "
            "with the items that are whole by --skip-broken (skip_broken=True)"
        )
    return Reading(digests, tuple(found))


def left_out(problems: Sequence[Problem]) -> tuple[str, ...]:
    """A note on what was left out, or none."""
    return (f"{len(problems)} problems, left out: {summary(problems)}",) if problems else ()


def picture_of(value: Any, name: str) -> Picture | None:
    """The picture in a cell of a table, None where there is none.

    Args:
        value: PIL image, bytes, `{"bytes": ..., "path": ...}` with at least one of both, or a
            function that returns the bytes.
        name: Name of the picture in error messages.
    """
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        if value is None and isinstance(path, (str, os.PathLike)):
            return Picture(name, partial(read_picture, path))
    if isinstance(value, (bytes, bytearray, memoryview)):
        content = bytes(value)
        return Picture(name, lambda: content)
    return Picture(name, value) if isinstance(value, Image.Image) or callable(value) else None
