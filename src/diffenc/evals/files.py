"""The files of a downloaded dataset: a folder, a zip archive, or a folder with archives in it."""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from diffenc.errors import ConfigError
from diffenc.storage.archives import MEMBER_BYTES, list_archive, read_member
from diffenc.storage.names import expanded, is_file, is_folder, printable
from diffenc.storage.reading import read_bytes

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_DEPTH = 4
_MOST = 200_000


class DatasetFiles:
    """Names and bytes of everything below a folder or inside an archive.

    Names are relative and have "/" between their parts; those inside of an archive in a folder go
    on from the archive's name.

    Args:
        source: Path of a folder or a .zip file.

    Raises:
        ConfigError: It does not exist, is neither, or is no whole archive.
    """

    def __init__(self, source: "str | os.PathLike[str]") -> None:
        self.source = expanded(source)
        self._readers: dict[str, Callable[[], bytes]] = {}
        if is_folder(self.source):
            self._add_folder()
        elif is_file(self.source) and self.source.suffix.lower() == ".zip":
            self._add_archive(self.source, "")
        elif is_file(self.source):
            raise ConfigError(f"{self.source} is neither a folder nor a .zip file")
        else:
            raise ConfigError(f"there is no folder and no file {printable(self.source)}")
        self._by_stem: defaultdict[str, list[str]] = defaultdict(list)
        for name in sorted(self._readers):
            path = PurePosixPath(name)
            if path.suffix.lower() in PICTURE_SUFFIXES:
                self._by_stem[path.stem.lower()].append(name)

    @property
    def has_pictures(self) -> bool:
        """Whether there is any file of a picture."""
        return bool(self._by_stem)

    @property
    def names(self) -> list[str]:
        """Names of all files, sorted."""
        return sorted(self._readers)

    def reader(self, name: str) -> Callable[[], bytes]:
        """Function that reads a file when it is called, or raises a `ConfigError`."""
        return self._readers[name]

    def path(self, name: str) -> Path | None:
        """Path of a file, None inside an archive."""
        path = self.source / name
        return path if is_file(path) else None

    def named(self, *endings: str) -> list[str]:
        """Files whose name, without folders and in any case, is one of these or "*" and an end."""
        lowered = [ending.lower() for ending in endings]
        return [
            name
            for end in lowered
            for name in self.names
            if (base := PurePosixPath(name).name.lower()) == end
            or (end.startswith("*") and base.endswith(end[1:]))
        ]

    def picture(self, value: str) -> str | None:
        """The picture that a table means by a path or a stem, with or without a suffix.

        Among several with that stem, the one that shares most of the end of its path with the value
        is taken, then a lossless one.

        Raises:
            ConfigError: Several fit equally well, and are not copies of one picture.
        """
        path = PurePosixPath(value.strip().replace("\\", "/"))
        known = path.suffix.lower() in PICTURE_SUFFIXES
        stem = (path.stem if known else path.name).lower()
        above = [part.lower() for part in path.parts[:-1] if part not in (".", "..")]

        def rank(name: str) -> tuple[int, bool, int]:
            place = PurePosixPath(name)
            parts = [part.lower() for part in place.parts[:-1]]
            shared = 0
            while shared < min(len(parts), len(above)) and parts[-1 - shared] == above[-1 - shared]:
                shared += 1
            suffix = place.suffix.lower()
            other = known and suffix != path.suffix.lower()
            return -shared, other, PICTURE_SUFFIXES.index(suffix)

        names = self._by_stem.get(stem, [])
        if len(names) < 2:
            return next(iter(names), None)
        least = min(map(rank, names))
        return self.one_of([name for name in names if rank(name) == least], value)

    def one_of(self, names: Sequence[str], value: str) -> str:
        """The first of some files that a table may mean by a value, which must be copies.

        Raises:
            ConfigError: They are not.
        """
        first, *others = names
        for other in others:
            if self.reader(other)() != self.reader(first)():
                raise ConfigError(
                    f"{printable(value)} may be {first} or {other} in {self.source}, which differ; "
                    "leave one of them there, or name the dataset's own folder"
                )
        return first

    def _add_folder(self) -> None:
        for folder, below, names in os.walk(self.source):
            inside = Path(folder).relative_to(self.source)
            below[:] = sorted(
                name
                for name in below
                if not name.startswith((".", "__")) and len(inside.parts) < _DEPTH
            )
            for name in (name for name in names if not name.startswith(".")):
                path, shown = Path(folder, name), (inside / name).as_posix()
                if path.suffix.lower() == ".zip":
                    self._add_archive(path, f"{shown}/")
                else:
                    self._readers[shown] = partial(read_bytes, path, most=MEMBER_BYTES)
            if len(self._readers) > _MOST:
                raise ConfigError(
                    f"{self.source} holds more than {_MOST:,} files; name the dataset's own folder"
                )

    def _add_archive(self, path: Path, prefix: str) -> None:
        for name in list_archive(path, most=_MOST):
            if not name.startswith("__MACOSX"):
                self._readers[prefix + name] = partial(read_member, path, name)


def cached_dataset(repository: str) -> Path | None:
    """The folder of a dataset in the Hub's cache; nothing is looked up elsewhere."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type="dataset", local_files_only=True))
    except Exception:  # not there, in the words of several libraries
        return None


def resolve_data(
    data: "str | os.PathLike[str]",
    repositories: Sequence[str],
    *,
    terms: str = "",
) -> DatasetFiles:
    """The files of a folder, a .zip file, or a dataset in the Hub's cache; nothing is downloaded.

    Args:
        data: Path of the dataset, or one of `repositories`.
        repositories: Hub ids that the dataset is known by.
        terms: Steps that are needed before the dataset can be downloaded, as part of the error
            message.

    Raises:
        ConfigError: Nothing there; the message holds the command that downloads it.
    """
    label = os.fspath(data)
    if is_file(expanded(label)) or is_folder(expanded(label)):
        return DatasetFiles(label)
    known = {name.lower(): name for name in repositories}
    cached = label.lower() in known
    if cached and (folder := cached_dataset(known[label.lower()])):
        return DatasetFiles(folder)
    name = repositories[0]
    raise ConfigError(
        f"there is no {label!r} here: neither a folder, nor a .zip file"
        + (", nor in the Hub's cache" if cached else "")
        + f". Nothing is downloaded unasked: {terms}run 'hf download {name} --repo-type dataset "
        f"--local-dir {name.partition('/')[2]}' and pass that folder. 'shapes' needs no download."
    )
