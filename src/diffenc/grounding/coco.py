"""COCO's layout: instances with category names, or captions with the places of what they name.

Source:
    Lin et al. 2014 (COCO), arXiv:1405.0312; Kamath et al. 2021 (MDETR), arXiv:2104.12763, whose
    files of RefCOCO, Flickr30k and others say by `tokens_positive` which letters name a box.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffenc.checks.arguments import shown
from diffenc.errors import ConfigError
from diffenc.grounding.areas import Area, read_box, read_outline
from diffenc.grounding.naming import naming_spans
from diffenc.grounding.samples import Fault, GroundedImage, GroundedText, Phrase, Span
from diffenc.storage.names import inside, printable
from diffenc.storage.schema import checked


@dataclass(frozen=True, slots=True)
class CocoTables:
    """A file of COCO's, by id.

    Attributes:
        images: Records of pictures, in their order.
        annotations: Records of annotations.
        by_image: Annotations of each picture.
        categories: Names of categories.
    """

    images: tuple[Mapping[str, Any], ...]
    annotations: Mapping[int, Mapping[str, Any]]
    by_image: Mapping[int, tuple[Mapping[str, Any], ...]]
    categories: Mapping[int, str]


def coco_tables(content: Mapping[str, Any], path: Path) -> CocoTables:
    """The tables of a file of COCO's.

    Raises:
        ConfigError: A table is no list of records with ids, or two records of it have one id.
    """
    lists = {
        name: _records(content.get(name, []), f"{printable(path)}: {name}")
        for name in ("images", "annotations", "categories")
    }
    by_image: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for each in lists["annotations"]:
        by_image[checked(each.get("image_id"), int, f"{printable(path)}: image_id")].append(each)
    return CocoTables(
        tuple(lists["images"]),
        {each["id"]: each for each in lists["annotations"]},
        {own: tuple(some) for own, some in by_image.items()},
        {
            each["id"]: checked(each.get("name"), str, f"{printable(path)}: name of a category")
            for each in lists["categories"]
        },
    )


def coco_samples(tables: CocoTables, images: Path) -> Iterator[GroundedImage | Fault]:
    """A sample for each picture: a text for each of its categories, or its caption.

    The name of a category names all of its instances together, crowds included. Boxes without
    extent, of which published files hold a few, name nothing.

    Args:
        tables: Tables of the file.
        images: Folder of the pictures.
    """
    for place, record in enumerate(tables.images):
        some = tables.by_image.get(record["id"], ())
        name = str(record.get("file_name") or record["id"])
        try:
            texts = (
                (_captioned(record, some),)
                if isinstance(record.get("caption"), str)
                else tuple(_by_category(some, tables.categories))
            )
            image = inside(images, checked(record.get("file_name"), str, "file_name"))
            size = size_of(record)
        except ConfigError as error:
            yield Fault("with broken annotations", f"{name}: {error}", place)
            continue
        if texts:  # a thousand pictures of COCO have no instance
            yield GroundedImage(str(record["id"]), image, texts, size, place)


def size_of(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) that a picture's record tells."""
    if "height" not in record or "width" not in record:
        return None
    return checked(record["height"], int, "height"), checked(record["width"], int, "width")


def area_of(annotation: Mapping[str, Any]) -> Area:
    """The area of an annotation: its box, and its segmentation where there is one.

    Raises:
        ConfigError: One of them is of no known form.
    """
    box = read_box(annotation.get("bbox"), "bbox", corners=False)
    return Area(box, *read_outline(annotation.get("segmentation"), "segmentation"))


def _by_category(
    annotations: tuple[Mapping[str, Any], ...], categories: Mapping[int, str]
) -> Iterator[GroundedText]:
    areas: dict[str, list[Area]] = {}
    for each in annotations:
        name = categories.get(checked(each.get("category_id"), int, "category_id"))
        if name is None:
            raise ConfigError(f"there is no category {each['category_id']}")
        area = area_of(each)
        if not area.is_empty:
            areas.setdefault(name, []).append(area)
    for name, some in areas.items():
        yield GroundedText(name, (Phrase(naming_spans(name), tuple(some)),))


def _captioned(
    record: Mapping[str, Any], annotations: tuple[Mapping[str, Any], ...]
) -> GroundedText:
    caption = record["caption"]
    areas: dict[Span, list[Area]] = {}
    own = [(each, area_of(each)) for each in annotations]
    if own and all(area.is_empty for _, area in own):
        raise ConfigError(f"no box has an extent: {shown([list(area.box) for _, area in own])}")
    for each, area in own:
        spans = checked(each.get("tokens_positive"), list[tuple[int, int]], "tokens_positive")
        for start, stop in spans:
            if not 0 <= start < stop <= len(caption):
                raise ConfigError(
                    f"tokens_positive [{start}, {stop}] is no part of the caption {shown(caption)}"
                )
            if not area.is_empty:
                areas.setdefault((start, stop), []).append(area)
    phrases = (Phrase(naming_spans(caption, *span), tuple(some)) for span, some in areas.items())
    return GroundedText(caption, tuple(phrases))


def _records(value: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise ConfigError(f"{where} must be a list of objects")
    ids = Counter(checked(each.get("id"), int, f"{where}: id") for each in value)
    twice = [number for number, times in ids.items() if times > 1]
    if twice:
        raise ConfigError(
            f"{where} hold {len(twice)} ids more than once ({shown(twice[0])}, ...): others refer "
            "to a record by its id, which must be its own. Take the files of one data set"
        )
    return value
