"""Output files: refused before work begins, complete or not there at all."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from diffenc.errors import OutputError


def check_output(path: Path, *, suffixes: Sequence[str], force: bool) -> None:
    """Find out, before anything is computed, whether a file can be written.

    Args:
        path: Of the file.
        suffixes: What its name may end with.
        force: Whether it may exist.

    Raises:
        OutputError: It has another suffix, exists, is no regular file, or its folder is missing or
            cannot be written.
    """
    if path.suffix.lower() not in suffixes:
        raise OutputError(f"the name of the output must end in {' or '.join(suffixes)}: {path}")
    try:
        if path.exists() and not path.is_file():
            raise OutputError(f"the output is no regular file: {path}")
        if path.exists() and not force:
            raise OutputError(f"the output exists already: {path} (--force replaces it)")
        if not path.parent.is_dir():
            raise OutputError(f"the folder of the output does not exist: {path.parent}")
        partial = _partial(path)
        partial.touch()
        partial.unlink()
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, and rename it only when it is complete.

    Raises:
        OutputError: It cannot be written; nothing is left behind.
    """
    partial = _partial(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777  # safetensors creates files for their owner alone
        write(partial)
        partial.chmod(mode)
        partial.replace(path)
    except Exception as error:  # safetensors and Pillow raise more than OSError
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}.partial{path.suffix}")
