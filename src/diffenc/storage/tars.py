"""Files in plain .tar archives, which are read in place and never unpacked."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffenc.errors import ConfigError, DiffencError
from diffenc.storage.names import StrPath, is_file, printable, reason


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive.

    Attributes:
        name: Name of the file in the archive.
        start: Place of its first byte in the archive.
        size: Size of the file, in bytes.
    """

    name: str
    start: int
    size: int


def list_tar(path: StrPath, *, error: type[DiffencError] = ConfigError) -> Iterator[Member]:
    """Regular files of a .tar archive, in its order; folders, links and devices are left out.

    Args:
        path: Path of the archive.
        error: Class of the exception that is raised.

    Raises:
        DiffencError: `error`: it is missing, compressed, cut off, or no archive.
    """
    if not is_file(path):
        raise error(f"cannot read {printable(path)}: there is no such file")
    try:
        with tarfile.open(path, "r:") as archive:
            while (entry := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # one for each file piles up
                if entry.isreg() and not entry.issparse():
                    yield Member(entry.name, entry.offset_data, entry.size)
    except (tarfile.TarError, OSError, ValueError, EOFError) as failure:
        with Path(path).open("rb") as file:
            start = file.read(6)
        if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")):
            raise error(
                f"{printable(path)} is compressed, and pictures are read from their places in an "
                "archive: unpack it, or make a plain .tar of it, as gunzip does"
            ) from failure
        raise error(f"{printable(path)} is no whole .tar file: {reason(failure)}") from failure


def read_tar_member(path: StrPath, member: Member, *, error: type[DiffencError]) -> bytes:
    """The content of a file in an archive; several threads may read at once.

    Raises:
        DiffencError: `error`: the archive is gone, or ends before the file does.
    """
    try:
        with Path(path).open("rb") as archive:
            archive.seek(member.start)
            content = archive.read(member.size)
    except (OSError, ValueError, MemoryError) as failure:
        raise error(
            f"cannot read {printable(member.name)} in {printable(path)}: {reason(failure)}"
        ) from failure
    if len(content) < member.size:
        raise error(f"cannot read {printable(member.name)} in {printable(path)}: it is cut off")
    return content
