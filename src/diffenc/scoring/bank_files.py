"""A query bank's files: the table of contents, and shards that say which bank they belong to.

    bank.json                    what the bank holds; written last
    plan.json                    what a bank that is being built will hold; see `bank_plan`
    queries-00000.safetensors    rows of queries, one tensor per layer

A row is one picture at one step; rows stand in the order of pictures, then steps, references last.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffenc.errors import BackboneError, DiffencError
from diffenc.scoring.config import ScorerConfig
from diffenc.storage.names import inside, is_file, printable, reason
from diffenc.storage.reading import read_json

BANK_FILE, PLAN_FILE = "bank.json", "plan.json"
FORMAT = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_MOST_BYTES = 2**30  # of the table of contents: millions of names
_REFERENCES = {None: 0, "gray": 1, "neutral": 8}

Shapes = tuple[tuple[int, int], ...]
"""(cells, channels) of the queries of each layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file of rows.

    Attributes:
        file: Its name.
        first: Number of its first row.
        rows: Number of its rows.
        digest: Digest of its values.
    """

    file: str
    first: int
    rows: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BankContents:
    """What `bank.json` says.

    Attributes:
        bank: Digest of everything that the queries were made from; every shard bears it.
        backbone: Name of the model.
        config: Config of the scorer that built the bank.
        layers: Module paths of the cross-attentions.
        shapes: (cells, channels) of each layer.
        size: (height, width) of the pictures, in pixels.
        dtype: Floating point type of the stored queries.
        names: Names of the images.
        skipped: Name of and reason for each image that was left out.
        references: Number of reference pictures, whose rows come last.
        weights: Mark of the weights that a search reads, see `weights_mark`.
        shards: The files, in the order of their rows.
    """

    bank: str
    backbone: str
    config: ScorerConfig
    layers: tuple[str, ...]
    shapes: Shapes
    size: tuple[int, int]
    dtype: str
    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    references: int
    weights: Mapping[str, Any]
    shards: tuple[Shard, ...]


class LayerDigest:
    """Digest of rows of several layers, taken in as they come."""

    def __init__(self, layers: int) -> None:
        self._each = [hashlib.blake2b(digest_size=16) for _ in range(layers)]

    def update(self, parts: Sequence[Tensor]) -> None:
        """Take in some rows of each layer."""
        for digest, rows in zip(self._each, parts, strict=True):
            digest.update(rows.contiguous().view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """What was taken in, as 32 hexadecimal digits."""
        whole = b"".join(digest.digest() for digest in self._each)
        return hashlib.blake2b(whole, digest_size=16).hexdigest()


def shard_name(index: int) -> str:
    """Name of a shard's file."""
    return f"queries-{index:05d}.safetensors"


def shard_files(folder: Path) -> list[Path]:
    """Every file in a folder that is named like a shard."""
    return sorted(folder.glob("queries-*.safetensors"))


def header_of(opened: Any) -> Mapping[str, Any]:
    """What a shard that is open says of itself: "bank", "first", "rows" and "digest"."""
    try:
        header = json.loads((opened.metadata() or {})["shard"])
    except (KeyError, ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def check_shard(opened: Any, shard: Shard, *, bank: str, shapes: Shapes, dtype: str) -> None:
    """Compare an open shard's header with what the bank says of it; no values are read.

    Raises:
        BackboneError: It belongs to another bank or place, or holds other tensors.
    """
    expected = {"bank": bank, "first": shard.first, "rows": shard.rows, "digest": shard.digest}
    header = header_of(opened)
    if not header:
        raise BackboneError("it does not say which bank it belongs to")
    if header.get("bank") != bank:
        raise BackboneError("it belongs to another bank")
    if header != expected:
        raise BackboneError(
            f"it holds {header.get('rows')!r} rows from row {header.get('first')!r} on, and the "
            f"table of contents wants {shard.rows} from row {shard.first} on"
        )
    tensors = {f"layer.{layer}": [shard.rows, *shape] for layer, shape in enumerate(shapes)}
    if set(opened.keys()) != tensors.keys():
        raise BackboneError(f"it holds the tensors {printable(sorted(opened.keys()))}")
    for name, shape in tensors.items():
        entry = opened.get_slice(name)
        if entry.get_shape() != shape or entry.get_dtype() != _STORED[dtype]:
            raise BackboneError(
                f"its tensor {name} is {entry.get_shape()} of {entry.get_dtype()}, and the bank "
                f"wants {shape} of {_STORED[dtype]}"
            )


def check_shards(folder: Path, contents: BankContents) -> None:
    """Compare the headers of all shards with the table of contents.

    Raises:
        BackboneError: A shard is missing, broken or of another bank, or there is one too many.
    """
    from safetensors import safe_open

    for shard in contents.shards:
        path = shard_path(folder, shard)
        try:
            with safe_open(path, "pt") as opened:
                check_shard(
                    opened,
                    shard,
                    bank=contents.bank,
                    shapes=contents.shapes,
                    dtype=contents.dtype,
                )
        except Exception as error:  # safetensors raises errors of its own
            raise unreadable(path, error) from error
    known = {shard.file for shard in contents.shards}
    if foreign := [path.name for path in shard_files(folder) if path.name not in known]:
        raise BackboneError(
            f"{folder} holds {foreign[0]}, which its {BANK_FILE} does not name: two banks were "
            "mixed. Remove that file, or build the bank again"
        )


def shard_path(folder: Path, shard: Shard) -> Path:
    """Path of a shard, which must lie within the folder, also where it is a link.

    Raises:
        BackboneError: It leads out of the folder.
    """
    path = inside(folder, shard.file, error=BackboneError)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise BackboneError(f"{path} is a link that leads out of the bank's folder")
    return path


def unreadable(path: Path, error: Exception) -> BackboneError:
    """The error of a shard that cannot be read."""
    return BackboneError(
        f"cannot read {path} of the bank: {reason(error)}. Build the bank again, or copy it again "
        "from where it is whole"
    )


def read_contents(folder: Path) -> BankContents:
    """The table of contents of a complete bank.

    Raises:
        BackboneError: There is none, or it is broken, contradicts itself or is of another format.
    """
    path = folder / BANK_FILE
    if not is_file(path):
        begun = is_file(folder / PLAN_FILE)
        raise BackboneError(
            f"there is no complete query bank in {folder}: {BANK_FILE} is missing; "
            + (
                "it was begun, and the same call of scorer.build_index or diffenc index goes on"
                if begun
                else "build one with scorer.build_index(images, folder) or diffenc index"
            )
        )
    values = read_json(path, error=BackboneError, most=_MOST_BYTES)
    if "format" in values and values["format"] != FORMAT:
        raise BackboneError(
            f"{path} has format {printable(values['format'], 40)}, this version reads {FORMAT}; "
            "build the bank again"
        )
    for key, (fits, what) in _FIELDS.items():
        if key not in values:
            raise _no_contents(path, f"it lacks {key!r}")
        if not fits(values[key]):
            raise _no_contents(path, f"{key} must be {what}, got {printable(values[key], 80)}")
    contents = _contents(values, path)
    _check_sums(contents, path)
    return contents


def _no_contents(path: Path, why: str) -> BackboneError:
    return BackboneError(f"{path} is no table of contents of a query bank: {why}")


def _contents(values: Mapping[str, Any], path: Path) -> BankContents:
    try:
        config = ScorerConfig.from_dict(values["config"])
    except (DiffencError, TypeError, ValueError) as error:
        raise _no_contents(path, f"its config is not allowed: {reason(error)}") from error
    return BankContents(
        bank=values["bank"],
        backbone=values["backbone"],
        config=config,
        layers=tuple(values["layers"]),
        shapes=tuple((cells, channels) for cells, channels in values["shapes"]),
        size=(values["size"][0], values["size"][1]),
        dtype=values["dtype"],
        names=tuple(values["names"]),
        skipped=tuple((name, why) for name, why in values["skipped"]),
        references=values["references"],
        weights=values["weights"],
        shards=tuple(Shard(**shard) for shard in values["shards"]),
    )


def _check_sums(contents: BankContents, path: Path) -> None:
    """Refuse what cannot be of one bank."""
    config, steps = contents.config, len(contents.config.steps)
    if config.mode != "shared-query":
        raise _no_contents(path, f"its config has mode {config.mode!r}")
    if len(set(contents.names)) < len(contents.names):
        raise _no_contents(path, "a name stands there twice")
    layers = len(contents.layers)
    counts = {layers, len(contents.shapes), len(contents.weights["norms"])}
    if len(set(contents.layers)) < layers or min(counts) < layers or len(contents.shapes) != layers:
        raise _no_contents(path, "layers, shapes and weights differ in number")
    kind = config.calibration
    digest = config.reference_digest or ""
    references = int(digest.split("-")[0]) if re.match(r"[0-9]{1,9}-", digest) else 0
    references = _REFERENCES.get(kind, references)
    if contents.references != references:
        raise _no_contents(
            path, f"calibration {kind!r} has {references} references, not {contents.references}"
        )
    rows = 0
    for index, shard in enumerate(contents.shards):
        if shard.file != shard_name(index) or shard.first != rows:
            raise _no_contents(
                path,
                f"shard {index} is {printable(shard.file, 80)} from row {shard.first} on, and must "
                f"be {shard_name(index)} from row {rows} on",
            )
        rows += shard.rows
    expected = (len(contents.names) + contents.references) * steps
    if rows != expected:
        raise _no_contents(
            path,
            f"its shards have {rows} rows, and {len(contents.names)} images and "
            f"{contents.references} references at {steps} steps have {expected}",
        )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32}", value) is not None


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_count(v, 1) for v in value)


def _list_of(fits: Callable[[object], bool], least: int = 0) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return isinstance(value, list) and len(value) >= least and all(map(fits, value))

    return check


def _is_skipped(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))


def _is_shard(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"file", "first", "rows", "digest"}
        and _is_text(value["file"])
        and _is_count(value["first"])
        and _is_count(value["rows"], 1)
        and _is_digest(value["digest"])
    )


def _is_mark(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"dtype", "digest", "norms"}
        and value["dtype"] in [*DTYPES]
        and _is_digest(value["digest"])
        and isinstance(value["norms"], list)
        and all(isinstance(norm, int | float) and norm >= 0 for norm in value["norms"])
    )


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "format": (_is_count, "a number"),
    "bank": (_is_digest, "a digest of 32 hexadecimal digits"),
    "backbone": (_is_text, "the name of a model"),
    "config": (lambda value: isinstance(value, dict), "the options of a scorer"),
    "layers": (_list_of(_is_text, 1), "a list of one or more layers' names"),
    "shapes": (_list_of(_is_pair, 1), "a list of pairs, cells and channels of each layer"),
    "size": (_is_pair, "height and width in pixels"),
    "dtype": (lambda value: value in [*DTYPES], f"one of {[*DTYPES]}"),
    "names": (_list_of(_is_text, 1), "a list of one or more texts"),
    "skipped": (_list_of(_is_skipped), "a list of pairs, name and reason"),
    "references": (_is_count, "a number"),
    "weights": (_is_mark, "dtype, digest and norms"),
    "shards": (_list_of(_is_shard, 1), "a list of one or more shards: file, first, rows, digest"),
}
