"""Our own layout: a picture, a text, and which of its words name which boxes, a line each.

{"image": "a.jpg", "text": "is the red car left of a tree?", "phrases": [
    {"words": "red car", "boxes": [[12, 40, 200, 160]]},
    {"span": [25, 29], "boxes": [[230, 5, 400, 210]]}]}
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffenc.checks.arguments import shown
from diffenc.errors import ConfigError
from diffenc.grounding.areas import Area, outline_box, read_box, read_outline
from diffenc.grounding.naming import naming_spans
from diffenc.grounding.samples import Fault, GroundedImage, GroundedText, Phrase, Span
from diffenc.inputs.words import word_places
from diffenc.storage.lines import parse_json_lines
from diffenc.storage.names import inside
from diffenc.storage.reading import DATA_BYTES, read_text
from diffenc.storage.schema import make


@dataclass(frozen=True, slots=True, kw_only=True)
class PhraseRecord:
    """Words of a text and what they name.

    Attributes:
        words: The words as they stand in the text, wherever they stand.
        span: Index of their first letter and of the one behind the last, in place of `words`.
        boxes: Left, upper, right and lower edge of each thing in pixels of the upright picture.
        segmentations: Outlines of further things, as COCO has them: a list of polygons, or runs.
    """

    words: str | None = None
    span: tuple[int, int] | None = None
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    segmentations: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecord:
    """A line.

    Attributes:
        image: Name of the picture.
        text: Text about it.
        phrases: Phrases of the text.
        size: (height, width) that boxes are measured in; None is the picture's, whatever it is.
        id: Name of the sample; None is the number of its line.
    """

    image: str
    text: str
    phrases: tuple[dict[str, Any], ...]
    size: tuple[int, int] | None = None
    id: str | int | None = None


def record_samples(path: Path, images: Path) -> Iterator[GroundedImage | Fault]:
    """A sample for each line.

    Args:
        path: File with a JSON object a line.
        images: Folder of the pictures.

    Raises:
        ConfigError: The file cannot be read.
    """
    objects, broken = parse_json_lines(read_text(path, most=DATA_BYTES), where=path.name)
    lines: dict[int, Any] = {**dict(objects), **dict(broken)}
    for place, number in enumerate(sorted(lines)):
        value = lines[number]
        if isinstance(value, str):
            yield Fault("that are no JSON", value, place)
            continue
        try:
            record: TextRecord = make(TextRecord, value)
            phrases = tuple(_phrase(record.text, each) for each in record.phrases)
            image = inside(images, record.image)
        except ConfigError as error:
            yield Fault("that cannot be read", f"line {number}: {error}", place)
            continue
        key = str(number if record.id is None else record.id)
        text = GroundedText(record.text, phrases)
        yield GroundedImage(key, image, (text,), record.size, place)


def _phrase(text: str, values: dict[str, Any]) -> Phrase:
    record: PhraseRecord = make(PhraseRecord, values, "phrases")
    areas = [Area(read_box(box, "a box", corners=True)) for box in record.boxes]
    for value in record.segmentations:
        outline = read_outline(value, "a segmentation")
        if not any(outline):
            raise ConfigError("a segmentation is empty")
        areas.append(Area(outline_box(*outline), *outline))
    for area in areas:
        if area.is_empty:
            raise ConfigError(
                f"{shown(list(area.box))} has no extent; a box is [left, top, right, bottom]"
            )
    if not areas:
        raise ConfigError(
            f"the phrase {shown(record.words or record.span)} names no boxes and no segmentations"
        )
    spans = [inner for span in _spans(text, record) for inner in naming_spans(text, *span)]
    return Phrase(tuple(spans), tuple(areas))


def _spans(text: str, record: PhraseRecord) -> list[Span]:
    if (record.words is None) == (record.span is None):
        raise ConfigError("a phrase has either words, as they stand in the text, or a span")
    if record.words is not None:
        places = list(word_places(text, record.words))
        if not places:
            raise ConfigError(f"{shown(record.words)} does not stand in {shown(text)}")
        return places
    assert record.span is not None
    start, stop = record.span
    if not 0 <= start < stop <= len(text):
        raise ConfigError(f"span [{start}, {stop}] is no part of {shown(text)}")
    return [(start, stop)]
