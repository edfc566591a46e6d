"""A query bank's files: what each is called, holds and says of itself.

    bank.json                    what the bank holds; written last
    plan.json                    what a bank that is being built will hold; see `bank_plan`
    queries-00000.safetensors    rows of queries, one tensor per layer

A row is one picture at one step; rows stand in the order of pictures, then steps, references last.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffenc.errors import BackboneError
from diffenc.scoring.config import ScorerConfig
from diffenc.storage.names import inside, printable, reason

BANK_FILE, PLAN_FILE = "bank.json", "plan.json"
FORMAT = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Shapes = tuple[tuple[int, int], ...]
"""Shape of the queries of each layer: (cells, channels)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file of rows.

    Attributes:
        file: Name of the file.
        first: Number of the file's first row, counted over the whole bank.
        rows: Number of rows in the file.
        digest: Digest of the values in the file.
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
        shapes: Shape (cells, channels) of the queries of each layer.
        size: Size of the pictures in pixels, (height, width).
        dtype: Floating point type of the stored queries.
        names: Names of the images.
        skipped: Name of and reason for each image that was left out.
        references: Number of reference pictures, whose rows come last.
        weights: Mark of the weights that a search reads, see `weights_mark`.
        shards: The files, in the order of their rows.
        unchanged: Whether the contents are as they were written.
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
    unchanged: bool


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


def json_digest(values: Mapping[str, Any]) -> str:
    """A digest of what JSON holds, as 32 hexadecimal digits; the order of keys does not count."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


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
