"""Files written whole or not at all, and folders that one program writes at a time.

Every writer raises `OutputError` and leaves what stood there before.
"""

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from diffenc.errors import DiffencError, OutputError
from diffenc.storage.names import StrPath, printable, reason


@contextmanager
def writing(path: StrPath) -> Iterator[Path]:
    """A file beside `path` to be filled, which takes its name once the block is left.

    Raises:
        OutputError: It cannot be written. Whatever goes wrong, what stood there before remains, and
            nothing else is left.
    """
    target = Path(path)
    partial = target.with_name(f".{uuid.uuid4().hex[:12]}.partial{target.suffix}")
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777  # safetensors creates files for their owner alone
        yield partial
        partial.chmod(mode)
        partial.replace(target)
    except DiffencError:
        raise
    except Exception as error:  # safetensors and Pillow raise more than OSError
        raise OutputError(f"cannot write {printable(path)}: {reason(error)}") from error
    finally:
        with suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)


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


def write_tensors(
    path: StrPath, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as a safetensors file, whole or not at all.

    Args:
        path: File to write.
        tensors: Tensors by name; they are copied where they share memory.
        metadata: Texts for the file's header.

    Raises:
        OutputError: It cannot be written.
    """
    from safetensors.torch import save_file

    apart = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    with writing(path) as partial:
        save_file(apart, partial, metadata={"format": "pt", **(metadata or {})})


def begin_folder(folder: StrPath, marker: str) -> Path:
    """Make a folder, and remove the file that says that it is whole; write that one last.

    Raises:
        OutputError: The folder cannot be written.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / marker).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {printable(folder)}: {reason(error)}") from error
    return target


@contextmanager
def locked(folder: StrPath, *, purpose: str) -> Iterator[None]:
    """Keep other processes and threads from writing to a folder while the block runs.

    The lock is the operating system's: it ends with the process, however that ends.

    Args:
        folder: Folder that exists.
        purpose: What the other one is doing, for the message: "building this index".

    Raises:
        OutputError: Somebody else holds it, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    # `is_singleton` off: two locks of one process on one file exclude each other.
    lock = FileLock(Path(folder) / ".lock", timeout=0, is_singleton=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"{folder} is in use: another program is {purpose}; wait for it, or name another folder"
        ) from error
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {printable(folder)}: {reason(error)}") from error
    try:
        yield
    finally:
        lock.release()


def remove_folder(folder: StrPath) -> None:
    """Remove a folder and what is in it.

    Raises:
        OutputError: It cannot be removed.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"cannot remove {folder}: {reason(error)}") from error
