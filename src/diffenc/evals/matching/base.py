"""Items of two pictures and two captions, and the interface of models that match them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor

from diffenc.evals.items import Benchmark, Picture, digest_of

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
        return digest_of([*self.captions, *picture_digests])


@dataclass(frozen=True, kw_only=True)
class MatchingBenchmark(Benchmark[Item]):
    """Items to be scored, and how results are shown.

    Attributes:
        name: Name of the benchmark whose rules apply: "winoground" or "mmvp-vlm".
        label_kind: Kind of the labels that results are split by first.
        average: Unit of the mean that gives the overall result: "items", or "labels" of that kind.
        template: Text that is scored for a caption, which replaces "{}" in it.
    """

    name: BenchmarkName
    label_kind: str
    average: Average = "items"
    template: str = "{}"

    def texts(self, item: Item) -> list[str]:
        """Texts that are scored for an item's captions."""
        return [self.template.replace("{}", caption) for caption in item.captions]
