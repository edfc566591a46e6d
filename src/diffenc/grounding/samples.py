"""Pictures with texts whose words name areas of them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from diffenc.grounding.areas import Area, area_content

Span = tuple[int, int]
"""Index of the first letter of a part of a text, and of the one behind its last."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words of a text and what they name.

    Attributes:
        spans: Places of the words in the text.
        areas: Everything in the picture that they name.
    """

    spans: tuple[Span, ...]
    areas: tuple[Area, ...]


@dataclass(frozen=True, slots=True)
class GroundedText:
    """A text about a picture.

    Attributes:
        text: The text, which conditions the denoiser.
        phrases: Phrases of it; its other words are left to themselves.
    """

    text: str
    phrases: tuple[Phrase, ...]


@dataclass(frozen=True, slots=True)
class GroundedImage:
    """A picture, with one text or several from which each epoch draws one.

    Attributes:
        key: Name of the sample, which also seeds its noise.
        image: Path of the picture.
        texts: Texts about it.
        size: (height, width) that the areas are measured in; None is not known.
        place: Index of its record in the annotations.
    """

    key: str
    image: Path
    texts: tuple[GroundedText, ...]
    size: tuple[int, int] | None = None
    place: int = 0

    @property
    def images(self) -> tuple[Path, ...]:
        """The picture alone: what samples of every kind have."""
        return (self.image,)

    def content(self) -> list[str]:
        """What is learnt from it, beside the picture: its name and a digest."""
        digest = hashlib.blake2b(digest_size=12)
        for each in self.texts:
            digest.update(each.text.encode(errors="replace"))
            for phrase in each.phrases:
                digest.update(repr(phrase.spans).encode())
                for area in phrase.areas:
                    digest.update(area_content(area).encode())
        return [self.key, digest.hexdigest()]


@dataclass(frozen=True, slots=True)
class Fault:
    """A record that cannot be used.

    Attributes:
        kind: What is wrong with it, as it reads behind a number of samples: "with missing images".
        where: Its name and what is wrong there.
        place: Index of the record.
    """

    kind: str
    where: str
    place: int
