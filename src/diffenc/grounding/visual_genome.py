"""Visual Genome's `region_descriptions.json`: some fifty described boxes for each picture.

Source:
    Krishna et al. 2016 (Visual Genome), arXiv:1602.07332, and its released files.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffenc.errors import ConfigError
from diffenc.grounding.areas import Area, read_box
from diffenc.grounding.naming import head_spans
from diffenc.grounding.samples import Fault, GroundedImage, GroundedText, Phrase
from diffenc.storage.names import is_file
from diffenc.storage.schema import checked

FOLDERS = ("", "VG_100K", "VG_100K_2")
"""Folders within that of the pictures in which they are looked for."""


def region_samples(content: Sequence[Any], images: Path) -> Iterator[GroundedImage | Fault]:
    """A sample for each picture, with a text for each region.

    Args:
        content: Content of `region_descriptions.json`.
        images: Folder that holds the pictures, or `VG_100K` and `VG_100K_2`.
    """
    for place, record in enumerate(content):
        try:
            own = checked(record, dict[str, Any], "a record")
            number = checked(own.get("id", own.get("image_id")), int, "id")
            regions = checked(own.get("regions"), list[Mapping[str, Any]], "regions")
            texts = tuple(text for region in regions if (text := _text(region)) is not None)
        except ConfigError as error:
            yield Fault("with broken regions", f"record {place}: {error}", place)
            continue
        if texts:
            yield GroundedImage(str(number), _picture(images, number), texts, None, place)


def _text(region: Mapping[str, Any]) -> GroundedText | None:
    """The text of a region; None where it has no words or no extent."""
    phrase = checked(region.get("phrase"), str, "phrase").strip()
    edges = [region.get(name) for name in ("x", "y", "width", "height")]
    area = Area(read_box(edges, f"the box of {phrase!r}", corners=False))
    spans = head_spans(phrase)
    if area.is_empty or not spans:
        return None
    return GroundedText(phrase, (Phrase(spans, (area,)),))


def _picture(images: Path, number: int) -> Path:
    paths = [images / folder / f"{number}.jpg" for folder in FOLDERS]
    return next((path for path in paths if is_file(path)), paths[0])
