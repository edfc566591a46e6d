"""Names of files: whether they lead anywhere, stay in their folder, and can be shown."""

import os
import re
from pathlib import Path
from typing import TypeAlias

from diffenc.errors import ConfigError, DiffencError

StrPath: TypeAlias = "str | os.PathLike[str]"


SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which no encoding can write."""


def is_file(path: StrPath) -> bool:
    """Whether a regular file of that name can be seen; False for names that no file can have."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long, no permission; a null byte, half a surrogate pair
        return False


def is_folder(path: StrPath) -> bool:
    """Whether a folder of that name can be seen; False for names that no folder can have."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def exists(path: StrPath) -> bool:
    """Whether something of that name can be seen; False for names that nothing can have."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def expanded(path: StrPath) -> Path:
    """A path with "~" as the home folder; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def inside(folder: StrPath, name: str, *, error: type[DiffencError] = ConfigError) -> Path:
    """The path of a file that another file names, which must lie within the folder.

    Args:
        folder: Folder that the name is relative to.
        name: Relative path of the other file.
        error: Class of the exception that is raised.

    Raises:
        DiffencError: `error`: the name is absolute, leads out of the folder, or is none.
    """
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else []
    leaves = not parts or any(part in ("", ".", "..") or ":" in part for part in parts)
    if leaves or "\0" in name or SURROGATE.search(name):
        raise error(
            f"{folder} names the file {name!r}; names must be relative and stay within the folder"
        )
    return Path(folder).joinpath(*parts)


def reason(error: BaseException) -> str:
    """Text of an exception in one line, without the path, which messages name themselves."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def printable(value: object, limit: int = 200) -> str:
    """A value as text for messages: one line that every terminal takes, shortened in the middle."""
    text = str(value).encode(errors="backslashreplace").decode()
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 :]}"


def checked_path(what: str, value: object, *, error: type[DiffencError] = ConfigError) -> Path:
    """The path that a caller passed, which may lead nowhere but can be asked for.

    Args:
        what: Description of what the path leads to, for messages, such as "a projector".
        value: Value that the caller passed.
        error: Class of the exception that is raised.

    Raises:
        DiffencError: `error`: it is no path, or one that no file system takes.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise error(f"{what} is given by its path, as text, got {type(value).__name__}")
    label: str = os.fspath(value)
    if not label or "\0" in label or SURROGATE.search(label):
        raise error(f"{printable(repr(label))} is no path of {what}")
    try:
        Path(label).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as failure:  # too long, a loop of links, no permission
        raise error(f"cannot use {printable(label)} for {what}: {reason(failure)}") from failure
    return Path(label)
