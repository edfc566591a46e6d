"""COCO's captions from its own annotation files and from Karpathy's split of them.

Source:
    Chen et al. 2015 (Microsoft COCO Captions), arXiv:1504.00325.
    Karpathy and Fei-Fei 2015, arXiv:1412.2306: 5,000 images each for validation and test.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffenc.errors import ConfigError
from diffenc.evals.base import Picture, Problem
from diffenc.evals.captioning.data import CaptionItem, CaptionSet, check_ids
from diffenc.evals.files import DatasetFiles

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
        annotations: With `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`).
        images: A folder, folders in it, or a .zip file with the pictures.
        image_ids: Which images, as numbers or text; None is all that have captions.

    Returns:
        The captioned pictures; what is wrong with files is in `problems`, and refused by
        `evaluate_captions`.

    Raises:
        ConfigError: A file is missing or of another form, or an id is not in it.
    """
    path = Path(annotations).expanduser()
    content = _read_json(path, ("images", "annotations"))
    problems: list[Problem] = []
    captions: defaultdict[str, list[str]] = defaultdict(list)
    for index, row in enumerate(content["annotations"]):
        name, text = _field(row, "image_id"), _field(row, "caption")
        if name is None or not isinstance(text, str) or not text.strip():
            problems.append(Problem("broken annotations", f"annotation {index}"))
        else:
            captions[str(name)].append(text)
    entries: list[_Entry] = []
    known: set[str] = set()
    for index, row in enumerate(content["images"]):
        name, file = _field(row, "id"), _field(row, "file_name")
        if name is None or not isinstance(file, str):
            problems.append(Problem("broken images", f"image {index}"))
            continue
        known.add(str(name))
        entries.append((str(name), file, captions.get(str(name), [])))
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
        dataset: With `images`: `split`, `cocoid`, `filepath`, `filename`, `sentences[].raw`.
        images: A folder, folders in it, or a .zip file with the pictures; both `val2014` and
            `train2014` where the split needs them.
        split: "train", "restval", "val" or "test".
        image_ids: Which COCO ids; None is all of the split.

    Raises:
        ConfigError: A file is missing or of another form, a split or id is not in it.
    """
    path = Path(dataset).expanduser()
    content = _read_json(path, ("images",))
    problems: list[Problem] = []
    entries: list[_Entry] = []
    there: set[str] = set()
    for index, row in enumerate(content["images"]):
        part = _field(row, "split")
        there.add(str(part))
        if part != split:
            continue
        name = _field(row, "cocoid", "imgid")
        file = _field(row, "filename")
        if name is None or not isinstance(file, str):
            problems.append(Problem("broken images", f"image {index}"))
            continue
        folder = _field(row, "filepath")
        texts = [_field(sentence, "raw") for sentence in _list(_field(row, "sentences"))]
        found = [text for text in texts if isinstance(text, str) and text.strip()]
        entries.append((str(name), f"{folder}/{file}" if folder else file, found))
    if not entries and not problems:
        raise ConfigError(f"{path} has no split {split!r}; it has {sorted(there)}")
    made = _caption_set(f"karpathy-{split}", path, entries, images, problems, image_ids)
    if split in ("val", "test") and len(entries) != _KARPATHY_SIZE:
        note = f"{len(entries)} images where Karpathy's {split} has {_KARPATHY_SIZE}"
        made = CaptionSet(
            made.name, made.source, made.items, False, made.problems, (*made.notes, note)
        )
    return made


def load_coco(data: _Path, *, annotations: _Path | None = None, split: str = "test") -> CaptionSet:
    """Read COCO's captions from one folder: annotations and pictures, nothing is downloaded.

    Args:
        data: A folder with pictures in it or in folders in it, and `dataset_coco.json` or one
            `captions_*.json`, these also in `annotations`; or with `annotations` a .zip file.
        annotations: Which of these files is read, wherever it lies.
        split: Of `dataset_coco.json`.

    Raises:
        ConfigError: There is no such folder, no annotation file in it, or more than one.
    """
    folder = Path(data).expanduser()
    if not folder.exists():
        raise ConfigError(
            f"there is no folder {folder} with pictures and captions of COCO, and nothing is "
            "downloaded unasked. 'shapes' needs no download"
        )
    path = Path(annotations).expanduser() if annotations else _annotations_in(folder)
    if path.name.lower().startswith("dataset"):
        return load_karpathy(path, folder, split=split)
    return load_coco_captions(path, folder)


def _annotations_in(folder: Path) -> Path:
    places = (folder, folder / "annotations")
    for pattern in ("dataset_coco.json", "captions_*.json"):
        found = sorted({path for place in places for path in place.glob(pattern)})
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found)
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
    found = {entry[0]: entry for entry in entries}
    wanted = None if image_ids is None else [str(each) for each in image_ids]
    if wanted is not None:
        check_ids(wanted, set(found), str(path))
    files = DatasetFiles(images)
    chosen = set(wanted or found)
    items, bare = [], 0
    for image_id, file, captions in found.values():
        if image_id not in chosen:
            continue
        if not captions:
            bare += 1
            if wanted is not None:
                problems.append(Problem("images without captions", f"image {image_id}"))
            continue
        picture = files.picture(file)
        if picture is None:
            problems.append(Problem("missing pictures", f"image {image_id}", file))
        else:
            reader = files.reader(picture)
            items.append(CaptionItem(image_id, Picture(picture, reader), tuple(captions)))
    notes = []
    if bare and wanted is None:
        notes.append(f"{bare} images have no captions and are left out")
    if wanted is not None and len(wanted) < len(found):
        notes.append(f"{len(wanted)} of {len(found)} images; CIDEr depends on which ones")
    return CaptionSet(name, str(path), tuple(items), wanted is None, tuple(problems), tuple(notes))


def _read_json(path: Path, keys: Sequence[str]) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; captions of COCO come as one JSON file")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}; download it again") from error
    lists = isinstance(content, dict) and all(isinstance(content.get(k), list) for k in keys)
    if not lists:
        there = sorted(content)[:8] if isinstance(content, dict) else type(content).__name__
        raise ConfigError(
            f"{path} must hold the lists {' and '.join(map(repr, keys))}, it has {there}. "
            "captions_*.json of COCO goes to load_coco_captions, dataset_coco.json to load_karpathy"
        )
    return dict(content)


def _field(row: Any, *names: str) -> Any:
    if isinstance(row, dict):
        for name in names:
            if row.get(name) is not None:
                return row[name]
    return None


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
