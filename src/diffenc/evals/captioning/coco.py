"""COCO's captions from its own annotation files and from Karpathy's split of them.

Source:
    Chen et al. 2015 (Microsoft COCO Captions), arXiv:1504.00325.
    Karpathy and Fei-Fei 2015, arXiv:1412.2306: 5,000 images each for validation and test.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffenc.errors import ConfigError
from diffenc.evals.captioning.data import CaptionItem, CaptionSet, check_ids
from diffenc.evals.files import DatasetFiles
from diffenc.evals.items import Picture, Problem
from diffenc.storage.names import expanded, is_file, is_folder, printable
from diffenc.storage.reading import DATA_BYTES, read_json

SPLITS = ("train", "restval", "val", "test")
_KARPATHY_SIZE = 5000

_Path = str | os.PathLike[str]
_Entry = tuple[str, str, list[str]]
"""Image id, name of its file, captions."""


def load_coco_captions(
    annotations: _Path, images: _Path, *, image_ids: Sequence[int | str] | None = None
) -> CaptionSet:
    """Read an annotation file such as `captions_val2014.json`, and find its pictures.

    Args:
        annotations: JSON file with `images` (`id`, `file_name`) and `annotations` (`image_id`,
            `caption`).
        images: Folder, or .zip file, that holds the pictures; subfolders are searched too.
        image_ids: Ids of the images to read, as numbers or text; None reads all that have captions.

    Returns:
        The captioned pictures; what is wrong with files is in `problems`, and refused by
        `evaluate_captions`.

    Raises:
        ConfigError: A file is missing or of another form, or an id is not in it.
    """
    path = expanded(annotations)
    content = _read_json(path, ("images", "annotations"))
    problems: list[Problem] = []
    captions: defaultdict[str, list[str]] = defaultdict(list)
    for index, row in enumerate(content["annotations"]):
        name, text = _id(row, "image_id"), _text(row, "caption")
        if name is None or text is None:
            problems.append(Problem("broken annotations", f"annotation {index}"))
        else:
            captions[name].append(text)
    entries: list[_Entry] = []
    known: set[str] = set()
    for index, row in enumerate(content["images"]):
        name, file = _id(row, "id"), _text(row, "file_name")
        if name is None or file is None:
            problems.append(Problem("broken images", f"image {index}"))
            continue
        known.add(name)
        entries.append((name, file, captions.get(name, [])))
    for name in captions.keys() - known:
        problems.append(Problem("captions of unknown images", f"image {name}"))
    return _caption_set("coco-captions", path, entries, images, problems, image_ids)


def load_karpathy(
    dataset: _Path,
    images: _Path,
    *,
    split: str = "test",
    image_ids: Sequence[int | str] | None = None,
) -> CaptionSet:
    """Read a part of Karpathy's split, `dataset_coco.json`, and find its pictures.

    Args:
        dataset: JSON file with `images`: `split`, `cocoid`, `filepath`, `filename`,
            `sentences[].raw`.
        images: Folder, or .zip file, that holds the pictures; subfolders are searched too. Some
            splits need both `val2014` and `train2014`.
        split: Name of the part to read: "train", "restval", "val" or "test".
        image_ids: COCO ids of the images to read; None reads the whole split.

    Raises:
        ConfigError: A file is missing or of another form, a split or id is not in it.
    """
    path = expanded(dataset)
    content = _read_json(path, ("images",))
    problems: list[Problem] = []
    entries: list[_Entry] = []
    there: set[str] = set()
    for index, row in enumerate(content["images"]):
        part = _field(row, "split")
        there.add(str(part))
        if part != split:
            continue
        name, file = _id(row, "cocoid", "imgid"), _text(row, "filename")
        folder, sentences = _field(row, "filepath"), _field(row, "sentences") or []
        if name is None or file is None or not isinstance(folder or "", str):
            problems.append(Problem("broken images", f"image {index}"))
            continue
        texts = (
            [_text(each, "raw") for each in sentences] if isinstance(sentences, list) else [None]
        )
        if None in texts:
            problems.append(Problem("broken sentences", f"image {name}"))
        captions = [text for text in texts if text is not None]
        entries.append((name, f"{folder}/{file}" if folder else file, captions))
    if not entries and not problems:
        raise ConfigError(f"{path} has no split {split!r}; it has {sorted(there)}")
    made = _caption_set(f"karpathy-{split}", path, entries, images, problems, image_ids)
    if split in ("val", "test") and len(entries) != _KARPATHY_SIZE:
        note = f"{len(entries)} images where Karpathy's {split} has {_KARPATHY_SIZE}"
        return replace(made, expected=None, notes=(*made.notes, note))
    return made


def load_coco(data: _Path, *, annotations: _Path | None = None, split: str = "test") -> CaptionSet:
    """Read COCO's captions from one folder: annotations and pictures, nothing is downloaded.

    Args:
        data: Folder that holds the pictures, also in subfolders, and `dataset_coco.json` or one
            `captions_*.json`, also in its subfolder `annotations`. If `annotations` is given, it
            may be a .zip file.
        annotations: Path of the annotation file, wherever it lies; None looks for it in `data`.
        split: Part of `dataset_coco.json` to read; other annotation files have no parts.

    Raises:
        ConfigError: There is no such folder, no annotation file in it, or more than one.
    """
    folder = expanded(data)
    if not (is_folder(folder) or is_file(folder)):
        raise ConfigError(
            f"there is no folder {folder} with pictures and captions of COCO, and nothing is "
            "downloaded unasked. 'shapes' needs no download"
        )
    path = expanded(annotations) if annotations else _annotations_in(folder)
    if path.name.lower().startswith("dataset"):
        return load_karpathy(path, folder, split=split)
    return load_coco_captions(path, folder)


def _annotations_in(folder: Path) -> Path:
    places = (folder, folder / "annotations")
    for pattern in ("dataset_coco.json", "captions_*.json"):
        candidates = sorted({path for place in places for path in place.glob(pattern)})
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            names = ", ".join(path.name for path in candidates)
            raise ConfigError(f"{folder} holds {names}; say which by --annotations (annotations=)")
    raise ConfigError(
        f"{folder} holds neither dataset_coco.json nor captions_*.json; put one there, or name it "
        "by --annotations (annotations=)"
    )


def _caption_set(
    name: str,
    path: Path,
    entries: Iterable[_Entry],
    images: _Path,
    problems: list[Problem],
    image_ids: Sequence[int | str] | None,
) -> CaptionSet:
    by_id: dict[str, _Entry] = {}
    for entry in entries:
        if entry[0] in by_id:
            problems.append(Problem("ids that occur twice", f"image {entry[0]}"))
        by_id.setdefault(entry[0], entry)
    requested_ids = None if image_ids is None else [str(each) for each in image_ids]
    if requested_ids is not None:
        check_ids(requested_ids, set(by_id), str(path))
    files = DatasetFiles(images)
    chosen = set(requested_ids or by_id)
    items, bare = [], 0
    for image_id, file, captions in by_id.values():
        if image_id not in chosen:
            continue
        if not captions:
            bare += 1
            if requested_ids is not None:
                problems.append(Problem("images without captions", f"image {image_id}"))
            continue
        picture = files.picture(file)
        if picture is None:
            problems.append(Problem("missing pictures", f"image {image_id}", file))
        else:
            reader = files.reader(picture)
            items.append(CaptionItem(image_id, Picture(picture, reader), tuple(captions)))
    notes = []
    if bare and requested_ids is None:
        notes.append(f"{bare} images have no captions and are left out")
    if requested_ids is not None and len(requested_ids) < len(by_id):
        notes.append(f"{len(requested_ids)} of {len(by_id)} images; CIDEr depends on which ones")
    return CaptionSet(
        name=name,
        source=str(path),
        items=tuple(items),
        expected=len(items) if requested_ids is None else None,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _read_json(path: Path, keys: Sequence[str]) -> Mapping[str, Any]:
    if not is_file(path):
        raise ConfigError(
            f"there is no file {printable(path)}; captions of COCO come as one JSON file"
        )
    content = read_json(path, object, most=DATA_BYTES)
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in keys):
        there = sorted(content)[:8] if isinstance(content, dict) else type(content).__name__
        raise ConfigError(
            f"{path} must hold the lists {' and '.join(map(repr, keys))}, it has {there}. "
            "captions_*.json of COCO goes to load_coco_captions, dataset_coco.json to load_karpathy"
        )
    return content


def _field(row: Any, *names: str) -> Any:
    if isinstance(row, dict):
        for name in names:
            if row.get(name) is not None:
                return row[name]
    return None


def _id(row: Any, *names: str) -> str | None:
    """An id as text; None where there is none, or something else than a text or whole number."""
    value = _field(row, *names)
    known = isinstance(value, (int, str)) and not isinstance(value, bool) and value != ""
    return str(value) if known else None


def _text(row: Any, name: str) -> str | None:
    value = _field(row, name)
    return value if isinstance(value, str) and value.strip() else None
