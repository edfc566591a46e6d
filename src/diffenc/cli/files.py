"""Output files: refused before work begins, complete or not there at all."""

from collections.abc import Callable, Sequence
from pathlib import Path

from diffenc.errors import OutputError
from diffenc.storage.names import exists, is_file, is_folder
from diffenc.storage.writing import reporting, require_writable, writing


def check_output(path: Path, *, suffixes: Sequence[str], force: bool) -> None:
    """Find out, before anything is computed, whether a file can be written.

    Args:
        path: Path of the file to be written.
        suffixes: Endings that the file's name may have.
        force: Whether the file may exist already.

    Raises:
        OutputError: It has another suffix, exists, is no regular file, or its folder is missing or
            cannot be written.
    """
    if path.suffix.lower() not in suffixes:
        raise OutputError(f"the name of the output must end in {' or '.join(suffixes)}: {path}")
    with reporting(path):
        if exists(path) and not is_file(path):
            raise OutputError(f"the output is no regular file: {path}")
        if exists(path) and not force:
            raise OutputError(f"the output exists already: {path} (--force replaces it)")
        if not is_folder(path.parent):
            raise OutputError(f"the folder of the output does not exist: {path.parent}")
    require_writable(path)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, and rename it only when it is complete.

    Raises:
        OutputError: It cannot be written; nothing is left behind.
    """
    with writing(path) as partial:
        write(partial)
