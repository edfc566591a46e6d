"""Pictures and the captions that people gave them."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffenc.errors import ConfigError
from diffenc.evals.items import Benchmark, Picture, check_positive


@dataclass(frozen=True, slots=True)
class CaptionItem:
    """A picture with its captions.

    Attributes:
        id: Id of the image in its dataset.
        picture: Picture to be captioned.
        references: Captions that people gave the picture, one or more.
    """

    id: str
    picture: Picture
    references: tuple[str, ...]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The one picture."""
        return (self.picture,)


@dataclass(frozen=True, kw_only=True)
class CaptionSet(Benchmark[CaptionItem]):
    """Pictures with captions, in the order of the dataset."""

    def select(
        self, image_ids: Sequence[int | str] | None = None, *, limit: int | None = None
    ) -> "CaptionSet":
        """Select some of the images, in the order of the dataset.

        Args:
            image_ids: Ids of the images to keep; None keeps all.
            limit: Largest number of images, counted from the first, 1 or more; None keeps all.

        Raises:
            ConfigError: An id is not there or stands twice, or `limit` is below 1.
        """
        items = self.items
        if image_ids is not None:
            names = [str(name) for name in image_ids]
            check_ids(names, {item.id for item in items}, self.source)
            items = tuple(item for item in items if item.id in set(names))
        if limit is not None:
            check_positive(limit=limit)
            items = items[:limit]
        note = f"{len(items)} of {len(self.items)} images; CIDEr depends on which ones"
        return self.with_items(items, note)


def check_ids(names: Sequence[str], known: "set[str]", source: str) -> None:
    """Refuse ids that are not there, all in one message, or that stand twice.

    Raises:
        ConfigError: There are such ids, or none at all.
    """
    if not names:
        raise ConfigError("image_ids is empty; leave it out to have all images")
    if unknown := [name for name in dict.fromkeys(names) if name not in known]:
        raise ConfigError(
            f"{len(unknown)} of {len(names)} image ids are not in {source}: "
            f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}; its ids look like "
            f"{', '.join(sorted(known)[:3])}"
        )
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"image_ids holds {double} twice; give each id once")
