"""Items of a benchmark, and the interface of models that match images and texts."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor

from diffenc.errors import ConfigError, ImageError
from diffenc.inputs.images import load_image
from diffenc.storage.names import reason

BenchmarkName = Literal["winoground", "mmvp-vlm"]
Average = Literal["items", "labels"]


@runtime_checkable
class Matcher(Protocol):
    """A model that scores images under texts.

    Attributes:
        name: Name of the model in tables and result files.
        description: Everything that the scores depend on, as JSON values; earlier scores are reused
            only if it is equal.
        deterministic: Whether the scores do not depend on the seed, so that one trial is enough.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def description(self) -> Mapping[str, Any]: ...  # noqa: D102

    @property
    def deterministic(self) -> bool: ...  # noqa: D102

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], *, seed: int) -> Tensor:
        """Scores (images, texts), higher is better; a third axis holds parts, such as timesteps."""
        ...

    def truncated(self, texts: Sequence[str]) -> Sequence[int]:
        """Number of tokens of each text that exceed the model's limit and are not read."""
        ...


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
            return image, _digest(repr(image.size).encode() + image.tobytes())
        try:
            content = self.source()
        except Exception as error:  # files and archives each raise errors of their own
            raise ImageError(f"cannot read the image {self.name}: {reason(error)}") from error
        return load_image(content, name=self.name), _digest(content)


@dataclass(frozen=True, slots=True)
class Item:
    """Two pictures and two captions; caption k is true of picture k alone.

    Attributes:
        id: Id of the item, unique in its benchmark.
        pictures: The two pictures.
        captions: The two captions as the benchmark states them, in the order of the pictures.
        labels: Labels that results are split by, by kind of label, such as
            `{"pattern": ("Color",)}`.
    """

    id: str
    pictures: tuple[Picture, Picture]
    captions: tuple[str, str]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def digest(self, picture_digests: Sequence[str]) -> str:
        """Return a digest of captions and pictures; changed labels leave it as it is."""
        return _digest(json.dumps([*self.captions, *picture_digests]).encode())


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an item, or a row that should have been one, cannot be scored.

    Attributes:
        kind: Kind of the problem in the plural, as in "missing pictures", so that problems can be
            counted.
        where: Item or row that has the problem.
        detail: Further description, or "".
    """

    kind: str
    where: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Items to be scored, and how results are shown.

    Attributes:
        name: Name of the benchmark whose rules apply: "winoground" or "mmvp-vlm".
        source: Origin of the items, named in reports and messages.
        items: Items that could be read.
        label_kind: Kind of the labels that results are split by first.
        average: Unit of the mean that gives the overall result: "items", or "labels" of that kind.
        template: Text that is scored for a caption, which replaces "{}" in it.
        expected: Number of items of the published benchmark; None for other data, such as
            miniatures.
        problems: Faults in the files of the benchmark.
        notes: Remarks that do not stop an evaluation.
    """

    name: BenchmarkName
    source: str
    items: tuple[Item, ...]
    label_kind: str
    average: Average = "items"
    template: str = "{}"
    expected: int | None = None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    def texts(self, item: Item) -> list[str]:
        """Texts that are scored for an item's captions."""
        return [self.template.replace("{}", caption) for caption in item.captions]


def check_unique(ids: Iterable[str], source: str) -> None:
    """Refuse items by the same id, of which one would get the scores or answers of the other.

    Raises:
        ConfigError: There are some.
    """
    if double := [name for name, count in Counter(ids).items() if count > 1]:
        raise ConfigError(f"{source} has {len(double)} ids more than once, such as {double[0]!r}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
