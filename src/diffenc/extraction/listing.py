"""Pictures by name: those of a folder, of a list, of an archive, or named one by one."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffenc.errors import ConfigError, ImageError, PromptError
from diffenc.extraction.lists import LIST_ENDINGS, read_list
from diffenc.inputs.images import load_image
from diffenc.inputs.pictures.files import PICTURE_BYTES, FileSource
from diffenc.storage.names import SURROGATE, StrPath, expanded, is_file, is_folder, printable
from diffenc.storage.tars import Member, list_tar, read_tar_member

PICTURE_ENDINGS = frozenset(
    (
        *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
        *(".jp2", ".heic", ".heif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
    )
)
"""Endings by which pictures are told from the other files of a folder or an archive."""

ARCHIVE_ENDING = ".tar"

_SAMPLES, _HEAD = 32, 65_536


@dataclass(frozen=True, slots=True)
class Listing:
    """Pictures in an order, each with a name of its own.

    Attributes:
        ids: Name of each picture; in a folder of features no two are alike.
        picture: Function that gives the picture at a place, as `load_image` takes it.
        prompts: Text of each picture; None where the source holds none.
        left_alone: Number of other files in the folder or the archive.
        source: Name of where the pictures come from.
        named: Whether the pictures were named by somebody, and so may not be there.
    """

    ids: Sequence[str]
    picture: Callable[[int], FileSource]
    prompts: Sequence[str] | None = None
    left_alone: int = 0
    source: str = ""
    named: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        """A digest of all names and texts in their order, by which the listing is known again."""
        digest = hashlib.blake2b(digest_size=16)
        for place, name in enumerate(self.ids):
            prompt = "" if self.prompts is None else self.prompts[place]
            digest.update(f"{len(name)} {name}{len(prompt)} {prompt}".encode())
        return digest.hexdigest()

    def samples(self) -> list[str]:
        """Marks of some of the files, spread over all: size and a digest of how each begins.

        They tell another folder with the same names, and nothing of a single picture. "" stands
        for a file that cannot be read.
        """
        step = max(1, len(self) // _SAMPLES)
        return [_mark(self.picture, place) for place in range(0, len(self), step)]


def list_pictures(
    source: "StrPath | Sequence[StrPath]",
    *,
    prompt_column: str | None = None,
    image_column: str = "image",
    id_column: str | None = None,
) -> Listing:
    """List pictures, without opening any.

    Args:
        source: A folder, which is searched with all folders in it; a list (.csv, .jsonl or .parquet
            with a column of paths, .txt with a path per line; paths are relative to the list's
            folder); a plain .tar archive; or paths of pictures.
        prompt_column: Name of the column with a text for each picture. In an archive it is an
            ending: "txt" takes "cat.txt" for "cat.jpg", and "1.5.txt" for "1.5.jpg".
        image_column: Name of a list's column with the paths.
        id_column: Name of a list's column with a name for each row; None takes the path.

    Raises:
        ConfigError: There are no pictures, no such place, or two of one name; a list or an archive
            cannot be read; a column that the source does not have.
        PromptError: A picture without a text, where there is a column for them.
    """
    of_lists = [image_column] * (image_column != "image") + [id_column] * bool(id_column)
    if not isinstance(source, (str, os.PathLike)):
        if of_lists:
            raise ConfigError(f"pictures alone have no column {of_lists[0]!r}; give a list of them")
        return _listed_paths(source, prompt_column)
    path = Path(source)
    ending = path.suffix.lower()
    if of_lists and (is_folder(path) or ending not in LIST_ENDINGS):
        raise ConfigError(f"{printable(path)} is no list, and has no column {of_lists[0]!r}")
    if is_folder(path):
        if prompt_column is not None:
            raise ConfigError(
                f"{printable(path)} is a folder, which has no column {prompt_column!r}; give a "
                ".csv, .jsonl or .parquet file with paths and texts, or one prompt for all"
            )
        listing = _folder(path)
    elif ending in LIST_ENDINGS:
        listing = _list(path, image_column, prompt_column, id_column)
    elif ending == ARCHIVE_ENDING:
        listing = _archive(path, prompt_column)
    else:
        return _listed_paths([path], prompt_column)
    check_apart(listing, has_ids=id_column is not None)
    return listing


def is_collection(path: StrPath) -> bool:
    """Whether a path names a folder, a list or an archive of pictures, by its looks."""
    return is_folder(path) or Path(path).suffix.lower() in (*LIST_ENDINGS, ARCHIVE_ENDING)


def _listed_paths(paths: Sequence[StrPath], prompt_column: str | None) -> Listing:
    if prompt_column is not None:
        raise ConfigError(f"pictures alone have no column {prompt_column!r}; give a list of them")
    files = [os.fspath(path) for path in paths]
    if not files:
        raise ConfigError("there are no pictures: give a folder, a list, an archive, or paths")
    return Listing([_plain(name) for name in files], files.__getitem__, named=True)


def _folder(root: Path) -> Listing:
    names, others = [], 0
    for name in _walk(root):
        if _is_picture(name):
            names.append(name)
        else:
            others += 1
    names.sort()
    if not names:
        raise ConfigError(
            f"{printable(root)} holds no pictures: none of its {others} files ends in "
            f"{', '.join(sorted(PICTURE_ENDINGS))}"
        )

    def picture(place: int) -> FileSource:
        return os.path.join(root, names[place])  # noqa: PTH118  # called for each picture

    ids = names if all(map(str.isascii, names)) else [_plain(name) for name in names]
    return Listing(ids, picture, None, others, str(root))


def _walk(root: Path) -> Iterator[str]:
    """Relative paths of the files below a folder, with "/"; hidden ones are left out."""
    entered = set()

    def refuse(error: OSError) -> None:
        raise ConfigError(f"cannot read {printable(error.filename)}: {error.strerror}") from error

    for folder, below, files in os.walk(root, onerror=refuse, followlinks=True):
        place = os.path.realpath(folder)
        if place in entered:  # a link back up, or a second one to the same folder
            below.clear()
            continue
        entered.add(place)
        below[:] = sorted(name for name in below if not name.startswith("."))
        prefix = Path(folder).relative_to(root).as_posix()
        for name in files:
            if not name.startswith("."):
                yield name if prefix == "." else f"{prefix}/{name}"


def _list(
    path: Path, image_column: str, prompt_column: str | None, id_column: str | None
) -> Listing:
    rows = read_list(path, image=image_column, prompt=prompt_column, id_=id_column)
    root = path.parent

    def picture(place: int) -> FileSource:
        return root / expanded(rows.paths[place])

    ids = [_plain(name) for name in (rows.paths if rows.ids is None else rows.ids)]
    return Listing(ids, picture, rows.prompts, 0, str(path), named=True)


def _archive(path: Path, prompt_ending: str | None) -> Listing:
    members: list[Member] = []
    texts: dict[str, Member] = {}
    others = 0
    for member in list_tar(path):
        if _is_picture(member.name) and not Path(member.name).name.startswith("."):
            members.append(member)
        elif prompt_ending is not None and member.name.endswith(f".{prompt_ending.lstrip('.')}"):
            texts[member.name] = member
        else:
            others += 1
    if not members:
        raise ConfigError(
            f"{printable(path)} holds no pictures: none of its {others} files ends in "
            f"{', '.join(sorted(PICTURE_ENDINGS))}"
        )

    def picture(place: int) -> FileSource:
        member = members[place]
        if member.size > PICTURE_BYTES:
            raise ImageError(f"{printable(member.name)} is larger than {PICTURE_BYTES:,} bytes")
        content = read_tar_member(path, member, error=ImageError)
        return {"bytes": content, "path": member.name}

    prompts = None
    if prompt_ending is not None:
        prompts = [_text_beside(path, member, texts, prompt_ending) for member in members]
    ids = [_plain(member.name) for member in members]
    return Listing(ids, picture, prompts, others, str(path))


def _text_beside(path: Path, member: Member, texts: dict[str, Member], ending: str) -> str:
    names = [f"{stem}.{ending.lstrip('.')}" for stem in _stems(member.name)]
    beside = next((texts[name] for name in names if name in texts), None)
    if beside is None:
        raise PromptError(
            f"{printable(member.name)} in {printable(path)} has no text beside it: there is no "
            f"{' and no '.join(map(printable, names))}"
        )
    content = read_tar_member(path, beside, error=PromptError)
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{printable(beside.name)} in {printable(path)} is not in UTF-8"
        ) from error


def _stems(name: str) -> list[str]:
    """What a text beside a picture may be called: as the picture is, or as WebDataset has it.

    That is the name up to its last point, whole, and up to the first point of its last part.
    """
    folder, slash, file = name.rpartition("/")
    first = f"{folder}{slash}{file.partition('.')[0]}"
    return list(dict.fromkeys([name.rpartition(".")[0], name, first]))


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURE_ENDINGS  # noqa: PTH122  # for each file


def _plain(name: str) -> str:
    """A name that every file can hold: bytes that are no UTF-8 are spelled out."""
    return SURROGATE.sub(lambda half: f"\\x{ord(half[0]) & 0xFF:02x}", name)


def check_apart(listing: Listing, *, has_ids: bool = False) -> None:
    """Refuse two pictures of one name, of which features are found for the last alone.

    Args:
        listing: Pictures.
        has_ids: Whether the names come from a column for names.

    Raises:
        ConfigError: There are such pictures.
    """
    places: dict[str, int] = {}
    for place, name in enumerate(listing.ids):
        if places.setdefault(name, place) != place:
            hint = "" if has_ids else " of a list (--id-column, id_column=)"
            source = printable(listing.source) or "the list of pictures"
            raise ConfigError(
                f"{source} names {printable(name)} twice, as pictures {places[name] + 1} and "
                f"{place + 1}: leave one of them, or give each row a name of its own in a "
                f"column{hint}"
            )


def _mark(picture: Callable[[int], FileSource], place: int) -> str:
    """Size of a picture's file in bytes and a digest of its first ones; "" where it has none."""
    try:
        source = picture(place)
        if isinstance(source, (str, os.PathLike)):
            if not is_file(source):
                return ""
            with Path(source).open("rb") as file:
                size, head = os.fstat(file.fileno()).st_size, file.read(_HEAD)
        else:
            content = source["bytes"] if isinstance(source, Mapping) else source
            if not isinstance(content, (bytes, bytearray, memoryview)):
                return ""
            size, head = len(content), bytes(content[:_HEAD])
    except (ImageError, OSError):  # which is told when the picture's turn comes
        return ""
    return f"{size} {hashlib.blake2b(head, digest_size=8).hexdigest()}"


def missing_files(listing: Listing) -> dict[int, str]:
    """Files that somebody named and that are not there: the reasons, by place."""
    missing = {}
    for place in range(len(listing) if listing.named else 0):
        source = listing.picture(place)
        if isinstance(source, (str, os.PathLike)) and not is_file(source):
            missing[place] = _why(source)
    return missing


def _why(source: StrPath) -> str:
    try:
        load_image(source)
    except ImageError as error:
        return str(error)
    return ""
