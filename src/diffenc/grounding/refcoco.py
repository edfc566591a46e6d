"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that refer to an instance of COCO.

Their folder holds `instances.json` and, as a pickle of Python 2, `refs(unc).p`, `refs(google).p` or
`refs(umd).p`. A pickle can call any function, so this one is read by a reader that knows lists,
tables, texts and numbers alone, and stops at the first name of anything else. The same list as
`refs(...).json`, and the Hub's tables in parquet, are read as well.

Source:
    Kazemzadeh et al. 2014 (ReferItGame); Yu et al. 2016 (RefCOCO, RefCOCO+), arXiv:1608.00272; Mao
    et al. 2015 (RefCOCOg), arXiv:1511.02283.
"""

import io
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffenc._optional import require
from diffenc.checks.arguments import shown
from diffenc.errors import ConfigError
from diffenc.grounding.areas import Area
from diffenc.grounding.coco import area_of, coco_tables, size_of
from diffenc.grounding.naming import head_spans
from diffenc.grounding.samples import Fault, GroundedImage, GroundedText, Phrase
from diffenc.storage.names import inside, is_file, printable, reason
from diffenc.storage.reading import DATA_BYTES, parse_json, read_bytes, read_json
from diffenc.storage.schema import checked

PICKLES = (".p", ".pkl", ".pickle")
_INSTANCES = "instances.json"
_COLUMNS = ("sentences", "raw_anns", "raw_image_info", "split")


def refs_file(folder: Path) -> Path:
    """The one file of expressions in a folder.

    Raises:
        ConfigError: There is none, or there are several.
    """
    refs = sorted(
        path for path in folder.glob("refs*") if path.suffix.lower() in (".json", *PICKLES)
    )
    if len(refs) != 1:
        count = "no file" if not refs else f"{len(refs)} files"
        raise ConfigError(
            f"{printable(folder)} holds {count} of expressions: name one, such as "
            f"{printable(refs[0] if refs else folder / 'refs(unc).p')}"
        )
    return refs[0]


def refs_samples(
    path: Path, images: Path, split: str, *, refs: "list[Any] | None" = None
) -> Iterator[GroundedImage | Fault]:
    """A sample for each instance that is referred to, with a text for each expression.

    Args:
        path: File of expressions, beside `instances.json`.
        images: Folder of COCO's pictures.
        split: Split that is read.
        refs: Content of the file; None reads it.

    Raises:
        ConfigError: A file cannot be read, or holds no such split.
    """
    if refs is None:
        pickled = path.suffix.lower() in PICKLES
        refs = read_refs(path) if pickled else read_json(path, list, most=DATA_BYTES)
    instances = path.parent / _INSTANCES
    if not is_file(instances):
        raise ConfigError(f"{printable(path)} needs {_INSTANCES} beside it, which holds the boxes")
    tables = coco_tables(read_json(instances, most=DATA_BYTES), instances)
    pictures = {each["id"]: each for each in tables.images}
    for place, ref in _in_split(refs, split, path):
        try:
            number = checked(ref.get("ann_id"), int, "ann_id")
            annotation = tables.annotations.get(number)
            if annotation is None:
                raise ConfigError(f"{_INSTANCES} has no annotation {number}")
            own = checked(annotation.get("image_id"), int, "image_id")
            picture = pictures.get(own)
            if picture is None:
                raise ConfigError(f"{_INSTANCES} has no image {own}")
            _require_same(own, ref.get("image_id"), f"annotation {number} of {_INSTANCES}")
            texts = _texts(ref.get("sentences"), area_of(annotation))
            image = inside(images, checked(picture.get("file_name"), str, "file_name"))
            size = size_of(picture)
        except ConfigError as error:
            yield Fault("with broken expressions", f"expression {place}: {error}", place)
            continue
        yield GroundedImage(str(ref.get("ref_id", place)), image, texts, size, place)


def table_samples(path: Path, images: Path, split: str) -> Iterator[GroundedImage | Fault]:
    """The samples of a table in parquet, as the Hub's copies of the three data sets have it.

    Its columns `sentences`, `raw_anns`, `raw_image_info` and, where there is one, `split` are read.

    Raises:
        ConfigError: The file cannot be read, or lacks a column.
        MissingExtraError: pyarrow is not installed.
    """
    parquet = require("pyarrow.parquet", extra="parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            lacking = [name for name in _COLUMNS[:-1] if name not in names]
            rows = (
                []
                if lacking
                else file.read(columns=[name for name in _COLUMNS if name in names]).to_pylist()
            )
    except Exception as error:  # pyarrow has errors of its own
        raise ConfigError(f"cannot read {printable(path)}: {reason(error)}") from error
    if lacking:
        raise ConfigError(f"{printable(path)} has no column {lacking}; its columns are {names}")
    chosen: Iterable[tuple[int, Any]] = enumerate(rows)
    for place, row in _in_split(rows, split, path) if "split" in names else chosen:
        try:
            annotation = parse_json(checked(row["raw_anns"], str, "raw_anns"), where="raw_anns")
            info = checked(row["raw_image_info"], str, "raw_image_info")
            picture = parse_json(info, where="raw_image_info")
            _require_same(annotation.get("image_id"), picture.get("id"), "raw_anns")
            texts = _texts(row["sentences"], area_of(annotation))
            image = inside(images, checked(picture.get("file_name"), str, "file_name"))
            size = size_of(picture)
        except ConfigError as error:
            yield Fault("with broken expressions", f"row {place}: {error}", place)
            continue
        yield GroundedImage(str(annotation.get("id", place)), image, texts, size, place)


def read_refs(path: Path) -> list[Any]:
    """The list in a pickle of expressions, of lists, tables, texts and numbers alone.

    Raises:
        ConfigError: It is broken, or names a class or a function, which is not called.
    """
    content = read_bytes(path, most=DATA_BYTES)
    try:
        value = _PlainUnpickler(
            io.BytesIO(content), fix_imports=False, encoding="utf-8", errors="replace"
        ).load()
    except ConfigError as error:
        raise ConfigError(
            f"{printable(path)} is not opened: {error}. RefCOCO's own file holds lists, tables, "
            "texts and numbers alone; take that one, or the same list as .json"
        ) from error
    except Exception as error:  # a broken pickle raises whatever it likes
        fault = f"{printable(path)} is no pickle that can be read: {reason(error)}"
        raise ConfigError(fault) from error
    if not isinstance(value, list):
        raise ConfigError(f"{printable(path)} must hold a list of expressions")
    return value


class _PlainUnpickler(pickle.Unpickler):
    """Reads values that need no name of a class or a function: nothing can be called."""

    def find_class(self, module: str, name: str) -> Any:
        raise ConfigError(f"it asks for {printable(f'{module}.{name}', 60)}")

    def persistent_load(self, pid: Any) -> Any:
        raise ConfigError("it asks for something outside of the file")


def _in_split(refs: Sequence[Any], split: str, path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    rows = [
        (place, checked(ref, dict[str, Any], f"{printable(path)}: an expression"))
        for place, ref in enumerate(refs)
    ]
    chosen = [(place, ref) for place, ref in rows if ref.get("split") == split]
    if not chosen:
        known = sorted({str(ref.get("split")) for _, ref in rows})
        raise ConfigError(f"{printable(path)} has no split {split!r}; it has {known}")
    return chosen


def _require_same(own: Any, other: Any, what: str) -> None:
    """Raise where an area and its expression are of two pictures; None says none."""
    if None not in (own, other) and own != other:
        raise ConfigError(
            f"{what} is of image {shown(own)}, and its expression of image {shown(other)}: they "
            "are of two data sets"
        )


def _texts(sentences: Any, area: Area) -> tuple[GroundedText, ...]:
    if area.is_empty:
        raise ConfigError(f"the box {list(area.box)} has no extent")
    texts = [
        checked(each.get("sent"), str, "sent").strip()
        for each in checked(sentences, list[Mapping[str, Any]], "sentences")
    ]
    heads = [(text, head_spans(text)) for text in texts]
    named = [GroundedText(text, (Phrase(spans, (area,)),)) for text, spans in heads if spans]
    if not named:
        raise ConfigError("there is no sentence")
    return tuple(named)
