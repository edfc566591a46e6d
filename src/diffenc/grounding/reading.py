"""Texts with boxes or masks, read from the layouts in which they are published."""

import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffenc.checks.arguments import whole
from diffenc.errors import ConfigError
from diffenc.grounding.coco import coco_samples, coco_tables
from diffenc.grounding.jsonl import record_samples
from diffenc.grounding.picture_bounds import find_misfit, picture_size
from diffenc.grounding.refcoco import PICKLES, refs_file, refs_samples, table_samples
from diffenc.grounding.samples import Fault, GroundedImage
from diffenc.grounding.visual_genome import region_samples
from diffenc.storage.names import expanded, is_file, is_folder, printable
from diffenc.storage.reading import DATA_BYTES, read_json

_NAMED = 3
_LAYOUTS = (
    "instances of COCO or captions with tokens_positive (.json), region_descriptions.json of "
    "Visual Genome, RefCOCO's folder, refs(...).p, refs(...).json or .parquet, or .jsonl with "
    "image, text and phrases"
)


def read_phrases(
    annotations: "str | os.PathLike[str]",
    images: "str | os.PathLike[str]",
    *,
    split: str = "train",
    limit: int | None = None,
    skip_broken: bool = False,
) -> list[GroundedImage]:
    """Pictures with texts whose words name areas of them.

    Args:
        annotations: File, or folder of RefCOCO, RefCOCO+ or RefCOCOg; its layout is told from its
            ending and content, see the guide on grounding.
        images: Folder to which names of pictures are relative.
        split: Split of RefCOCO's expressions, such as "train", "val" or "testA"; other layouts have
            a file for each.
        limit: Largest number of pictures with texts that are read, the first ones; None is all.
        skip_broken: Whether to leave out what cannot be used, instead of raising an error.

    Raises:
        ConfigError: The annotations cannot be read or hold nothing that can be used, or some of
            them cannot and `skip_broken` is not set: records that are broken, pictures that are
            missing or of another size than annotated, and areas that cannot be meant in their
            picture, see `diffenc.grounding.picture_bounds.find_misfit`.
    """
    samples, faults = find_phrases(annotations, images, split=split, limit=limit)
    if faults and not skip_broken:
        kinds = Counter(fault.kind for fault in faults)
        named = "; ".join(
            f"{count} {kind} "
            f"({', '.join([each.where for each in faults if each.kind == kind][:_NAMED])})"
            for kind, count in kinds.items()
        )
        raise ConfigError(
            f"{len(faults)} of {len(faults) + len(samples)} records cannot be used: {named}. "
            "Repair the data, or pass skip_broken=True"
        )
    if not samples:
        raise ConfigError(f"{printable(annotations)} holds no text with an area that can be used")
    return samples


def find_phrases(
    annotations: "str | os.PathLike[str]",
    images: "str | os.PathLike[str]",
    *,
    split: str = "train",
    limit: int | None = None,
    left_out: Collection[int] | None = None,
) -> tuple[list[GroundedImage], list[Fault]]:
    """Do the same as `read_phrases`, and give what cannot be used beside what can.

    Args:
        annotations: File or folder.
        images: Folder of the pictures.
        split: Split of RefCOCO's expressions.
        limit: Largest number of records that are looked at; None is all.
        left_out: Indices of records that are left out; pictures are not looked at then, nor whether
            areas fit them. None looks.

    Raises:
        ConfigError: The annotations cannot be read, or are of no known layout.
    """
    most = None if limit is None else whole("limit", limit, least=1)
    folder = expanded(images)
    if not is_folder(folder):
        raise ConfigError(f"there is no folder of pictures {printable(images)}")
    samples: list[GroundedImage] = []
    faults: list[Fault] = []
    keys: Counter[str] = Counter()
    size_of = lru_cache(None)(picture_size)  # several expressions are about one picture
    for each in _records(expanded(annotations), folder, split):
        if most is not None and len(samples) + len(faults) >= most:
            break
        if left_out is not None and each.place in left_out:
            faults.append(Fault("left out when the run began", "", each.place))
        elif isinstance(each, Fault):
            faults.append(each)
        elif left_out is None and not is_file(each.image):
            faults.append(Fault("with missing images", each.image.name, each.place))
        elif left_out is None and (misfit := find_misfit(each, size_of(each.image))):
            where = f"sample {printable(each.key)} on {printable(each.image.name)}: {misfit.detail}"
            faults.append(Fault(misfit.kind, where, each.place))
        else:
            keys[each.key] += 1
            times = keys[each.key]
            samples.append(each if times == 1 else replace(each, key=f"{each.key}#{times}"))
    return samples, faults


def _records(path: Path, images: Path, split: str) -> Iterable[GroundedImage | Fault]:
    if is_folder(path):
        return refs_samples(refs_file(path), images, split)
    ending = path.suffix.lower()
    if ending in (".jsonl", ".ndjson"):
        return record_samples(path, images)
    if ending == ".parquet":
        return table_samples(path, images, split)
    if ending in PICKLES:
        return refs_samples(path, images, split)
    if ending != ".json":
        raise ConfigError(f"{printable(path)} has no known layout; known are {_LAYOUTS}")
    content: Any = read_json(path, object, most=DATA_BYTES)
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return coco_samples(coco_tables(content, path), images)
    if isinstance(content, list) and content and isinstance(content[0], dict):
        if "regions" in content[0]:
            return region_samples(content, images)
        if "sentences" in content[0]:
            return refs_samples(path, images, split, refs=content)
    raise ConfigError(f"{printable(path)} has no known layout; known are {_LAYOUTS}")
