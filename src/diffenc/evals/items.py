"""What a benchmark is made of: pictures, items, and what is wrong with them."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from PIL import Image

from diffenc.errors import ConfigError, ImageError
from diffenc.inputs.images import load_image
from diffenc.inputs.pictures.files import read_picture
from diffenc.storage.names import reason


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a benchmark, read when it is needed.

    Attributes:
        name: Name of the picture's file, or its place in the data, for error messages.
        source: Function that returns the bytes of the file, or the picture itself.
    """

    name: str
    source: Callable[[], bytes] | Image.Image

    def open(self) -> Image.Image:
        """Upright and RGB.

        Raises:
            ImageError: It cannot be read.
        """
        return self.read()[0]

    def read(self) -> tuple[Image.Image, str]:
        """The picture, upright and RGB, and a digest of its file or pixels.

        Raises:
            ImageError: It cannot be read.
        """
        if isinstance(self.source, Image.Image):
            image = load_image(self.source, name=self.name)
            return image, digest_of_bytes(repr(image.size).encode() + image.tobytes())
        try:
            content = self.source()
        except Exception as error:  # files and archives each raise errors of their own
            raise ImageError(f"cannot read the image {self.name}: {reason(error)}") from error
        return load_image(content, name=self.name), digest_of_bytes(content)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an item, or a row that should have been one, cannot be used.

    Attributes:
        kind: Kind of the problem in the plural, as in "missing pictures", so that problems can be
            counted.
        where: Item or row that has the problem.
        detail: Further description, or "".
    """

    kind: str
    where: str
    detail: str = ""


class BenchmarkItem(Protocol):
    """An item of any benchmark.

    Attributes:
        id: Id of the item, unique in its benchmark.
        pictures: Pictures of the item.
    """

    @property
    def id(self) -> str: ...  # noqa: D102

    @property
    def pictures(self) -> Sequence[Picture]: ...  # noqa: D102


ItemT = TypeVar("ItemT", bound=BenchmarkItem)
_Self = TypeVar("_Self", bound="Benchmark[Any]")


@dataclass(frozen=True, kw_only=True)
class Benchmark(Generic[ItemT]):
    """Items of one kind; each kind of benchmark adds what its numbers need.

    Attributes:
        name: Name of the benchmark whose rules apply, in files and tables.
        source: Origin of the items, named in reports and messages.
        items: Items that could be read.
        expected: Number of items of the published benchmark; None for other data, such as
            miniatures.
        problems: Faults in the files of the benchmark.
        notes: Remarks that do not stop an evaluation.
    """

    name: str
    source: str
    items: tuple[ItemT, ...]
    expected: int | None = None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def published(self) -> bool:
        """Whether results may stand beside the paper's."""
        return self.expected is not None

    def limited(self: _Self, count: int) -> _Self:
        """The same benchmark with its first items alone, and a note if any is missing."""
        items = self.items[:count]
        return self.with_items(items, f"{len(items)} of {len(self.items)} questions, by --limit")

    def with_items(self: _Self, items: Sequence[ItemT], note: str) -> _Self:
        """The same benchmark with some of its items, and a note if any is missing."""
        if len(items) == len(self.items):
            return self
        return replace(self, items=tuple(items), notes=(*self.notes, note))


def picture_of(value: Any, name: str) -> Picture | None:
    """The picture in a cell of a table, None where there is none.

    Args:
        value: PIL image, bytes, `{"bytes": ..., "path": ...}` with at least one of both, or a
            function that returns the bytes.
        name: Name of the picture in error messages.
    """
    if isinstance(value, Mapping):
        path, value = value.get("path"), value.get("bytes")
        if value is None and isinstance(path, (str, os.PathLike)):
            return Picture(name, partial(read_picture, path))
    if isinstance(value, (bytes, bytearray, memoryview)):
        content = bytes(value)
        return Picture(name, lambda: content)
    return Picture(name, value) if isinstance(value, Image.Image) or callable(value) else None


def check_unique(ids: Iterable[str], source: str) -> None:
    """Refuse items by the same id, of which one would get the scores or answers of the other.

    Raises:
        ConfigError: There are some.
    """
    if double := [name for name, count in Counter(ids).items() if count > 1]:
        raise ConfigError(f"{source} has {len(double)} ids more than once, such as {double[0]!r}")


def check_positive(**numbers: int) -> None:
    """Raise a `ConfigError` unless each is an int of 1 or more."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an int of 1 or more, got {value!r}")


def digest_of(value: Any) -> str:
    """Return a digest of any value that JSON can hold."""
    return digest_of_bytes(
        json.dumps(value).encode()
    )  # escaped: half a surrogate pair has no bytes


def digest_of_bytes(content: bytes) -> str:
    """Return a digest of bytes."""
    return hashlib.sha256(content).hexdigest()[:16]
