"""Files in .zip archives, which are read and never unpacked."""

import re
import zipfile

from diffenc.errors import ConfigError, DiffencError
from diffenc.storage.names import SURROGATE, StrPath, is_file, printable, reason

MEMBER_BYTES = 2**30
"""Largest file in an archive that is read, in bytes."""

_ENCRYPTED = 0x1
# bzip2 and LZMA can make gigabytes of a few bytes in one step, which nothing bounds.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def list_archive(path: StrPath, *, most: int, error: type[DiffencError] = ConfigError) -> list[str]:
    """Names of the files in a .zip archive, in its order.

    Args:
        path: Path of the archive.
        most: Largest number of files.
        error: Class of the exception that is raised.

    Raises:
        DiffencError: `error`: it is no whole archive, is encrypted or of an unusual compression,
            or holds too many files, two of a name, or one whose name leads out of it.
    """
    if not is_file(path):
        raise error(f"cannot read {printable(path)}: there is no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    except Exception as failure:  # broken archives raise six kinds of errors
        raise error(
            f"{printable(path)} is no whole .zip file: {reason(failure)}; download it again"
        ) from failure
    if len(entries) > most:
        raise error(f"{path} holds {len(entries):,} files; more than {most:,} are not read")
    names: set[str] = set()
    for entry in entries:
        name = printable(repr(entry.filename))
        if entry.flag_bits & _ENCRYPTED:
            raise error(f"{path} is encrypted; unpack it first, with its password")
        if entry.compress_type not in _METHODS:
            raise error(
                f"{path} holds {name} in a compression that is not read; unpack it first, or make "
                "a .zip file that is stored or deflated"
            )
        if _leaves(entry.filename):
            raise error(f"{path} holds {name}, whose name leads out of the archive")
        if entry.filename in names:
            raise error(f"{path} holds {name} twice; make it anew with one of them")
        names.add(entry.filename)
    return [entry.filename for entry in entries]


def read_member(
    path: StrPath,
    name: str,
    *,
    most: int = MEMBER_BYTES,
    error: type[DiffencError] = ConfigError,
) -> bytes:
    """The content of a file in an archive.

    Args:
        path: Path of the archive.
        name: Name of the file in it.
        most: Largest size, in bytes.
        error: Class of the exception that is raised.

    Raises:
        DiffencError: `error`: the archive is gone, broken or another one now, or the file is
            larger.
    """
    shown = f"{printable(name)} in {printable(path)}"
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as member:
            content = member.read(most + 1)
    except Exception as failure:
        raise error(f"cannot read {shown}: {reason(failure)}") from failure
    if len(content) > most:
        raise error(f"cannot read {shown}: it is larger than {most:,} bytes")
    return content


def _leaves(name: str) -> bool:
    parts = re.split(r"[/\\]", name)
    return (
        parts[0] == ""
        or ".." in parts
        or bool(re.match(r"[A-Za-z]:", name))
        or (SURROGATE.search(name) is not None)
    )
