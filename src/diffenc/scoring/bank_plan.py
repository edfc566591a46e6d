"""What a query bank is made from, written before the first pass, so that it can be gone on with."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffenc.errors import ConfigError, ImageError, OutputError, ShapeError
from diffenc.inputs.images import ImageSource
from diffenc.memory.cache import content_key
from diffenc.scoring.bank_files import BANK_FILE, PLAN_FILE, shard_files, shard_name
from diffenc.storage.names import SURROGATE, exists, is_file, is_folder, printable, reason
from diffenc.storage.reading import read_json
from diffenc.storage.writing import write_json

ReadPicture = Callable[[ImageSource], Tensor]
"""Function that turns a picture into `pixel_values` of one row."""

_LOCK = ".lock"
_MOST_BYTES = 2**30


def check_names(names: Sequence[str], count: int) -> list[str]:
    """Names of images, one each.

    Raises:
        ShapeError: Another number of names than of images.
        ConfigError: A name is no text that JSON holds, or stands twice.
    """
    if isinstance(names, str):
        raise ConfigError(f"names must be a list of texts, got the text {printable(names, 80)!r}")
    if isinstance(names, (set, frozenset, Mapping)) or not isinstance(names, Iterable):
        raise ConfigError(
            f"names must be a list of texts, got a value of type {type(names).__name__}"
        )
    listed = list(names)
    if len(listed) != count:
        raise ShapeError(f"got {len(listed)} names for {count} images")
    places: dict[str, int] = {}
    for index, name in enumerate(listed):
        if not isinstance(name, str):
            raise ConfigError(f"names must be texts, got {type(name).__name__} for image {index}")
        if SURROGATE.search(name):
            raise ConfigError(
                f"the name of image {index}, {name!a}, is no valid Unicode; pass names= for "
                "files whose names are in another encoding"
            )
        if name in places:
            raise ConfigError(
                f"images {places[name]} and {index} have the same name, {printable(name, 80)!r}: "
                "give each image once, or pass names= that differ"
            )
        places[name] = index
    return listed


def look_at(
    images: Sequence[ImageSource],
    names: Sequence[str],
    read: ReadPicture,
    *,
    skip_broken: bool,
) -> tuple[list[int], list[str], list[tuple[str, str]], tuple[int, int]]:
    """Read every picture once, before any pass.

    Returns:
        Indices of the pictures that are whole, digests of what the model will see of them, the name
        of and the reason for each broken one, and the size in pixels, (height, width).

    Raises:
        ImageError: Some are broken and `skip_broken` is off, or all are; it names all of them.
        ShapeError: Sizes differ.
    """
    whole: list[int] = []
    digests: list[str] = []
    broken: list[tuple[str, str]] = []
    size: tuple[int, int] | None = None
    for index, image in enumerate(images):
        try:
            pixel_values = read(image)
        except ImageError as error:
            broken.append((names[index], printable(reason(error), 300)))
            continue
        here = (pixel_values.shape[2], pixel_values.shape[3])
        if (size := size or here) != here:
            raise ShapeError(
                f"images of a bank must have one size, got {size} and for image {index} {here}; "
                "choose resize='squash', 'crop' or 'pad'"
            )
        whole.append(index)
        digests.append(content_key(pixel_values).hex())
    if size is None or (broken and not skip_broken):
        raise _broken(broken, len(images), whole=size is not None)
    return whole, digests, broken, size


def _broken(broken: Sequence[tuple[str, str]], count: int, *, whole: bool) -> ImageError:
    go_on = ", or leave them out with skip_broken=True (--skip-broken)" if whole else ""
    listed = "; ".join(f"{printable(name)}: {why}" for name, why in broken)
    return ImageError(f"{len(broken)} of {count} images are broken; mend them{go_on}: {listed}")


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Find out whether a bank may be written to a folder.

    Raises:
        OutputError: It holds a complete bank that is not to be overwritten, or something else.
    """
    try:
        if not exists(folder):
            return
        entries = None if not is_folder(folder) else [path.name for path in folder.iterdir()]
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {printable(folder)}: {reason(error)}") from error
    if entries is None:
        raise OutputError(f"the bank's folder exists and is no folder: {folder}")
    if BANK_FILE in entries or PLAN_FILE in entries:
        if BANK_FILE in entries and not overwrite:
            raise OutputError(
                f"{folder} holds a complete bank; name another folder, or begin anew with "
                "overwrite=True (--force)"
            )
        return
    if any(name != _LOCK and not _is_partial(name) for name in entries):
        raise OutputError(f"the bank's folder exists and is not empty: {folder}")


def make_folder(folder: Path) -> None:
    """Make a folder where there is none.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {printable(folder)}: {reason(error)}") from error


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a bank that was begun and is not complete."""
    return is_file(folder / PLAN_FILE) and not is_file(folder / BANK_FILE)


def begin(folder: Path, plan: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Write the plan of a bank, unless it is the one that was begun in the folder.

    Returns:
        Whether this bank had been begun in the folder before.

    Raises:
        OutputError: Another bank was begun there, or the folder cannot be written.
    """
    check_folder(folder, overwrite=overwrite)  # again, now that nobody else writes
    plan = json.loads(json.dumps(plan))
    # Nothing is lost where no shard was written.
    if not overwrite and is_begun(folder) and is_file(folder / shard_name(0)):
        _check_same(_read_plan(folder), plan, folder)
        return True
    clear(folder)
    write_json(folder / PLAN_FILE, plan, indent=None)
    return False


def _read_plan(folder: Path) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = read_json(folder / PLAN_FILE, error=OutputError, most=_MOST_BYTES)
    except OutputError as error:
        raise OutputError(f"{error}; begin anew with overwrite=True (--force)") from error
    return plan


def clear(folder: Path, *, keep: Sequence[str] = ()) -> None:
    """Remove the files of a bank from its folder, the table of contents first.

    Args:
        folder: Folder of the bank.
        keep: Names of files that stay.

    Raises:
        OutputError: A file cannot be removed.
    """
    try:
        partial = [path for path in folder.iterdir() if _is_partial(path.name)]
        for path in (folder / BANK_FILE, folder / PLAN_FILE, *shard_files(folder), *partial):
            if path.name not in keep:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {reason(error)}") from error


def _check_same(begun: Mapping[str, Any], plan: Mapping[str, Any], folder: Path) -> None:
    """Compare the plan of a bank that was begun with the one that it is to be gone on with.

    Raises:
        OutputError: They differ; the message says in what.
    """
    if differing := _differences(begun, plan):
        shown = "; ".join(differing[:5]) + ("; ..." if len(differing) > 5 else "")
        raise OutputError(
            f"{folder} holds a bank that was begun with something else: {shown}. Go on with the "
            "call that began it, name another folder, or begin anew with overwrite=True (--force)"
        )


def _differences(begun: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    lines = []
    for key in dict.fromkeys([*plan, *begun]):
        there, here = begun.get(key), plan.get(key)
        if there == here:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            lines += [
                f"{key}.{name} was {_short(there.get(name))}, is {_short(here.get(name))}"
                for name in dict.fromkeys([*here, *there])
                if there.get(name) != here.get(name)
            ]
        elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
            places = [k for k, pair in enumerate(zip(there, here, strict=True)) if len({*pair}) > 1]
            shown = ", ".join(map(str, places[:3])) + (", ..." if len(places) > 3 else "")
            lines.append(f"{key} differ at {shown}, the first from 0")
        elif isinstance(there, list) and isinstance(here, list):
            lines.append(f"{key} were {len(there)}, are {len(here)}")
        else:
            lines.append(f"{key} was {_short(there)}, is {_short(here)}")
    return lines


def _short(value: object) -> str:
    return printable(value, 60)


def _is_partial(name: str) -> bool:
    return name.startswith(".") and ".partial" in name
