"""Folders of features opened: rows by name or place, one after another, or as a torch dataset."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffenc.config import described
from diffenc.errors import ConfigError, near_matches
from diffenc.extraction.index import INDEX_FILE, read_index
from diffenc.extraction.plan import PLAN_FILE, run_digest
from diffenc.extraction.shards import read_table, shard_name, shard_paths
from diffenc.storage.names import StrPath, checked_path, is_file, is_folder, printable
from diffenc.storage.reading import read_json
from diffenc.storage.tensors import open_tensors

_OPEN_SHARDS = 32


def open_features(folder: StrPath) -> "FeatureFolder":
    """Open a folder that `write_features` or `diffenc encode` wrote.

    Args:
        folder: Folder of the features.

    Raises:
        ConfigError: It holds no features, is not complete, or is broken.
        MissingExtraError: pyarrow is not installed.

    Examples:
        >>> from diffenc import Extractor, open_features, write_features
        >>> circle.save(folder / "circle.png")
        >>> features = write_features(folder, folder / "features", Extractor("shapes", pool="mean"))
        >>> open_features(folder / "features")["circle.png"]["up_blocks.0.attentions.1"].shape
        torch.Size([128])
    """
    return FeatureFolder(folder)


class FeatureFolder(Dataset[dict[str, Any]]):
    """Features of pictures on disk, by name of the picture or by place.

    A row is a dict with the picture's "id" and a tensor for each kind of feature, and "prompt"
    where each picture had its own. `features["cat.jpg"]` and `features[0]` read one row,
    `features[:100]` some, `for row in features` all in order, and `features.stack(name)` gives one
    tensor of all rows. It is a map-style torch dataset, which workers can pickle. Only the rows
    that are asked for are read.

    Args:
        folder: Folder of the features, as for `open_features`.

    Attributes:
        folder: Folder that the features lie in.
        made_from: What the features were made from: model, config, taps, what is kept.

    Raises:
        ConfigError: See `open_features`.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(self, folder: StrPath) -> None:
        self.folder = _complete(folder)
        self.made_from: dict[str, Any] = read_json(self.folder / PLAN_FILE)
        table = read_index(self.folder)
        self._rows = table.filter(table["shard"].is_valid())
        self._left_out = table.filter(table["reason"].is_valid())
        self._shards = self._rows["shard"].to_numpy()
        self._shard_rows = self._rows["row"].to_numpy()
        self._prompted = self._rows["prompt"].null_count < len(self._rows)
        self._places: dict[str, int] | None = None
        self._ids: tuple[str, ...] | None = None
        self._opened: OrderedDict[int, Any] = OrderedDict()
        self._verified: dict[int, tuple[int, int, int]] = {}
        self._run = run_digest(self.made_from)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        facts = {
            "folder": str(self.folder),
            "pictures": len(self),
            "skipped": len(self._left_out),
            "model": self.made_from["model"],
            "tensors": {name: tuple(s) for name, s in self.shapes.items()},
        }
        return described(type(self).__name__, facts)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the files that are open."""
        return {**vars(self), "_opened": OrderedDict()}

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the pictures, in order."""
        if self._ids is None:
            self._ids = tuple(self._rows["id"].to_pylist())
        return self._ids

    @property
    def skipped(self) -> dict[str, str]:
        """Reason why a picture was left out, by its name."""
        names, reasons = (self._left_out[name].to_pylist() for name in ("id", "reason"))
        return dict(zip(names, reasons, strict=True))

    @property
    def table(self) -> Any:
        """The index as a table of pyarrow, with the columns of `index.parquet`."""
        return self._rows

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of a picture's row, by name of the tensor."""
        opened = self._shard(int(self._shards[0]))
        return {
            name: tuple(opened.get_slice(name).get_shape()[1:])
            for name in opened.keys()  # noqa: SIM118  # no mapping
        }

    def __contains__(self, name: object) -> bool:
        return name in self._by_name()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._row(place) for place in range(len(self)))

    def __getitem__(self, key: "str | int | slice") -> Any:
        """A row by the picture's name or its place; a slice gives a list of rows."""
        if isinstance(key, slice):
            return self.__getitems__(range(*key.indices(len(self))))
        if isinstance(key, (str, os.PathLike)):
            return self._row(self._place_of(os.fspath(key)))
        return self._row(self._checked(key))

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows, as torch's `DataLoader` asks for them."""
        return [self._row(self._checked(place)) for place in places]

    def stack(self, name: str) -> Tensor:
        """One kind of feature of all pictures as one tensor, in memory.

        Raises:
            ConfigError: There is no such kind.
        """
        if name not in self.shapes:
            raise ConfigError(
                f"there are no features {name!r}; there are {list(self.shapes)}."
                f"{near_matches(name, self.shapes)}"
            )
        numbers = dict.fromkeys(self._shards.tolist())
        return torch.cat([self._shard(number).get_tensor(name) for number in numbers])

    def _row(self, place: int) -> dict[str, Any]:
        number, row = int(self._shards[place]), int(self._shard_rows[place])
        opened = self._shard(number)
        try:
            tensors: Mapping[str, Tensor] = {
                name: opened.get_slice(name)[row]
                for name in opened.keys()  # noqa: SIM118  # no mapping
            }
        except Exception as error:  # safetensors raises errors of its own
            raise ConfigError(
                f"{self.folder / shard_name(number)} has no row {row}: it is not the shard that "
                "the index names"
            ) from error
        names = {"id": self._rows["id"][place].as_py()}
        if self._prompted:
            names["prompt"] = self._rows["prompt"][place].as_py()
        return {**names, **tensors}

    def _shard(self, number: int) -> Any:
        """A shard's file, opened; those that were not used for long are closed."""
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        path = self.folder / shard_name(number)
        opened = open_tensors(path)
        self._check(number, path)
        self._opened[number] = opened
        if len(self._opened) > _OPEN_SHARDS:
            self._opened.popitem(last=False)
        return self._opened[number]

    def _check(self, number: int, path: Path) -> None:
        """Raise a `ConfigError` unless a shard is of this run and has the index's pictures.

        A file that was read before is not read again.
        """
        state = path.stat()
        mark = state.st_ino, state.st_size, state.st_mtime_ns
        if self._verified.get(number) == mark:
            return
        table = read_table(path, self._run)
        if table is None:
            raise ConfigError(
                f"{printable(path)} is of another run than {PLAN_FILE} says, or of none: files of "
                "two folders are mixed, a copy ended half-way, or the folder was written anew "
                "since it was opened. Open it again; if that fails too, copy the whole folder "
                "again, or write it again"
            )
        (places,) = np.nonzero(self._shards == number)
        if [self.ids[place] for place in places] != table.ids:
            raise ConfigError(
                f"{printable(path)} has the rows of other pictures than {INDEX_FILE} says: files "
                "of two folders are mixed, or the index was changed. Copy the whole folder again, "
                "or write it again"
            )
        self._verified[number] = mark

    def _by_name(self) -> dict[str, int]:
        if self._places is None:
            self._places = {name: place for place, name in enumerate(self.ids)}
        return self._places

    def _place_of(self, name: str) -> int:
        places = self._by_name()
        if name in places:
            return places[name]
        if why := self.skipped.get(name):
            raise KeyError(f"{name!r} was left out: {why}")
        raise KeyError(f"no picture is called {name!r}.{near_matches(name, places)}")

    def _checked(self, place: Any) -> int:
        try:
            number = index(place)
        except TypeError:
            raise ConfigError(
                f"a row is read by a picture's name, its place or a slice, got {place!r}"
            ) from None
        if not -len(self) <= number < len(self):
            raise IndexError(f"there are {len(self)} rows; there is no row {number}")
        return number % len(self)


def _complete(folder: StrPath) -> Path:
    """The folder, if it holds features and all of them."""
    root = checked_path("a folder of features", folder)
    if not is_folder(root):
        raise ConfigError(f"there is no such folder of features: {printable(root)}")
    if not is_file(root / PLAN_FILE):
        raise ConfigError(
            f"{printable(root)} holds no features: it has no {PLAN_FILE}; write_features and "
            "`diffenc encode` write such folders"
        )
    if not is_file(root / INDEX_FILE):
        shards = len(list(shard_paths(root)))
        raise ConfigError(
            f"the features in {printable(root)} are not complete ({shards} shards are there): "
            "repeat the command or the call that wrote them, which goes on where it stopped"
        )
    return root
