"""Files written whole or not at all, and folders that one program writes at a time.

Every writer raises `OutputError` and leaves what stood there before.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffenc.errors import DiffencError, OutputError
from diffenc.storage.names import StrPath, is_folder, printable, reason


@contextmanager
def reporting(path: StrPath) -> Iterator[None]:
    """Turn all errors of writing into an `OutputError`.

    Raises:
        OutputError: Something goes wrong that is no error of diffenc.
    """
    try:
        yield
    except DiffencError:
        raise
    except Exception as error:  # safetensors, Pillow and peft raise more than OSError
        raise OutputError(f"cannot write {printable(path)}: {reason(error)}") from error


@contextmanager
def writing(path: StrPath) -> Iterator[Path]:
    """A file beside `path` to be filled, which takes its name once the block is left.

    Raises:
        OutputError: It cannot be written. Whatever goes wrong, what stood there before remains, and
            nothing else is left.
    """
    target = Path(path)
    partial = target.parent / f".{uuid.uuid4().hex[:12]}.partial{target.suffix}"
    try:
        with reporting(path):
            partial.touch()
            mode = partial.stat().st_mode & 0o777  # safetensors creates files for their owner alone
            yield partial
            partial.chmod(mode)
            partial.replace(target)
    finally:
        with suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)


def require_writable(path: StrPath) -> None:
    """Find out whether a file can be written, and leave nothing.

    Raises:
        OutputError: It cannot.
    """
    partial = Path(path).parent / f".{Path(path).name}.partial"
    with reporting(path):
        partial.touch()
        partial.unlink()


def make_folder(folder: StrPath) -> Path:
    """Make a folder, and those above it.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot make the folder {printable(folder)}: {reason(error)}") from error
    return Path(folder)


def write_bytes(path: StrPath, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    with writing(path) as partial:
        partial.write_bytes(content)


def write_text(path: StrPath, text: str) -> None:
    """Write a text in UTF-8, whole or not at all.

    Raises:
        OutputError: It cannot be written, or is no valid Unicode.
    """
    with writing(path) as partial:
        partial.write_bytes(text.encode())


def write_json(path: StrPath, value: Any, *, indent: int | None = 2) -> None:
    """Write a value as JSON, whole or not at all; NaN and infinity are refused.

    Raises:
        OutputError: It cannot be written, or is nothing that JSON holds.
    """
    with writing(path) as partial:
        text = json.dumps(value, indent=indent, allow_nan=False)
        partial.write_bytes(f"{text}\n".encode())


def append_json_line(path: StrPath, value: Any) -> None:
    """Append a value to a file as one line of JSON; the file is made if there is none.

    Raises:
        OutputError: It cannot be written, or is nothing that JSON holds.
    """
    with reporting(path):
        line = json.dumps(value, ensure_ascii=False, allow_nan=False)
        with Path(path).open("ab") as file:
            file.write(f"{line}\n".encode("utf-8", "replace"))


def begin_folder(folder: StrPath, marker: str) -> Path:
    """Make a folder, and remove the file that says that it is whole; write that one last.

    Raises:
        OutputError: The folder cannot be written.
    """
    target = Path(folder)
    with reporting(folder):
        target.mkdir(parents=True, exist_ok=True)
        (target / marker).unlink(missing_ok=True)
    return target


@contextmanager
def locked(folder: StrPath, *, purpose: str, wait: bool = False, name: str = "") -> Iterator[None]:
    """Keep other processes and threads from writing to a folder while the block runs.

    The lock is the operating system's: it ends with the process, however that ends.

    Args:
        folder: Existing folder to lock.
        purpose: Description of what the other process is doing, for the message: "building this
            index".
        wait: Whether to wait until the other process is done, instead of raising an error.
        name: Name of a file in the folder that is locked instead of the whole folder.

    Raises:
        OutputError: Somebody else holds it, or the folder cannot be written.
    """
    from filelock import Timeout

    timeout, place = (-1 if wait else 0), Path(folder) / name
    if not is_folder(folder):  # filelock would make it
        raise OutputError(f"cannot use {printable(place)}: No such file or directory")
    file = Path(folder) / (f".{name}.lock" if name else ".lock")
    try:
        with reporting(place):
            lock = _held(file, timeout)
    except OutputError as error:
        if not isinstance(error.__cause__, Timeout):
            raise
        raise OutputError(
            f"{place} is in use: another program is {purpose}; wait for it, or name another one"
        ) from error
    try:
        yield
    finally:
        if os.name == "posix":  # elsewhere a file that is open cannot be removed
            file.unlink(missing_ok=True)
        lock.release()


def _held(file: Path, timeout: float) -> Any:
    """Lock a file that still exists: a former holder of the lock removes the file at its end."""
    from filelock import FileLock

    while True:
        # `is_singleton` off: two locks of one process on one file exclude each other.
        lock = FileLock(file, timeout=timeout, is_singleton=False)
        lock.acquire()
        opened = lock._context.lock_file_fd
        with suppress(OSError):
            if opened is None or os.fstat(opened).st_ino == file.stat().st_ino:
                return lock
        lock.release()


def remove_file(path: StrPath) -> None:
    """Remove a file, if it is there.

    Raises:
        OutputError: It cannot be removed.
    """
    try:
        Path(path).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot remove {printable(path)}: {reason(error)}") from error


def remove_folder(folder: StrPath) -> None:
    """Remove a folder and what is in it.

    Raises:
        OutputError: It cannot be removed.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot remove {printable(folder)}: {reason(error)}") from error
