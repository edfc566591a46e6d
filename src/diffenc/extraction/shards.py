"""Shards: safetensors files with the rows of some pictures, and their names in the header."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffenc.errors import ConfigError, ShapeError
from diffenc.extraction.rows import Rows
from diffenc.storage.names import is_file
from diffenc.storage.reading import parse_json
from diffenc.storage.tensors import read_metadata, write_tensors

HEADER = "diffenc"
"""Name of the header's entry that holds the table of a shard."""


def shard_name(number: int) -> str:
    """Name of the file of a shard."""
    return f"shard-{number:06d}.safetensors"


def shard_paths(folder: Path) -> Iterator[Path]:
    """The files of shards in a folder."""
    return folder.glob("shard-*.safetensors")


@dataclass(frozen=True, slots=True)
class ShardTable:
    """What the header of a shard says of its rows.

    Attributes:
        run: Digest of the run that wrote the shard.
        ids: Names of the pictures, in the order of the rows.
        skipped: Name of and reason for each picture of this shard that could not be read.
        prompts: Text of each picture; None where there are none, or one for all.
        truncated: Number of prompt tokens that were cut, per picture; empty without prompts.
        words: Word of each word token, per picture; empty where no words gather.
    """

    run: str
    ids: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    prompts: list[str] | None = None
    truncated: list[int] = field(default_factory=list)
    words: list[tuple[str, ...]] = field(default_factory=list)

    def to_json(self) -> str:
        """The table as text."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__})


class Shard:
    """Rows that are collected until they are written.

    Attributes:
        table: Names of the pictures and what else is said of them.
        tensors: Tensors by name, with room for all rows until `close`.
        conditioning: Conditioning of the features.
        grid: Token grid, as (height, width).
    """

    def __init__(self, capacity: int, run: str = "", *, prompted: bool = False) -> None:
        self.table = ShardTable(run, prompts=[] if prompted else None)
        self.tensors: dict[str, Tensor] = {}
        self.conditioning, self.grid = "", (0, 0)
        self._capacity = capacity

    def add(self, rows: Rows, ids: Sequence[str], prompts: Sequence[str] | None = None) -> None:
        """Put the rows of a batch behind those that are there.

        Raises:
            ShapeError: They are of another shape.
        """
        done = len(self.table.ids)
        for name, values in rows.tensors.items():
            if name not in self.tensors:
                shape = (self._capacity, *values.shape[1:])
                self.tensors[name] = torch.empty(shape, dtype=values.dtype, device="cpu")
            whole = self.tensors[name]
            if values.shape[1:] != whole.shape[1:]:
                raise ShapeError(
                    f"the images have different sizes: {name} is {tuple(whole.shape[1:])} for the "
                    f"first and {tuple(values.shape[1:])} from image {done} on; choose --resize "
                    "squash, crop or pad, or encode them one by one"
                )
            whole[done : done + len(values)] = values.cpu()
        self.conditioning, self.grid = rows.conditioning, rows.grid
        self.table.ids.extend(ids)
        self.table.truncated.extend(rows.truncated)
        self.table.words.extend(rows.words)
        if self.table.prompts is not None and prompts is not None:
            self.table.prompts.extend(prompts)

    def close(self) -> None:
        """Give back the room of rows that did not come."""
        count = len(self.table.ids)
        if count < self._capacity:
            self.tensors = {name: whole[:count].clone() for name, whole in self.tensors.items()}

    def write(self, path: Path) -> None:
        """Write the shard, whole or not at all.

        Raises:
            OutputError: It cannot be written.
        """
        write_tensors(path, self.tensors, metadata={HEADER: self.table.to_json()})


def read_table(path: Path, run: str) -> ShardTable | None:
    """The table of a shard of a run; None where the file is missing, cut off or of another run.

    Opening a safetensors file compares its length with its header.
    """
    if not is_file(path):
        return None
    try:
        values = parse_json(read_metadata(path)[HEADER], where=str(path))
        table = ShardTable(**_tuples(values))
    except (ConfigError, KeyError, TypeError):
        return None
    return table if table.run == run else None


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that they were."""
    paired = {name: [tuple(each) for each in values[name]] for name in ("skipped", "words")}
    return {**values, **paired}
