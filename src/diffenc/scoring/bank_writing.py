"""Shards of a query bank, written one after the other and taken over from an earlier call."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffenc.scoring.bank_files import (
    BANK_FILE,
    FORMAT,
    PLAN_FILE,
    LayerDigest,
    Shapes,
    Shard,
    check_shard,
    header_of,
    json_digest,
    shard_name,
)
from diffenc.scoring.bank_plan import clear
from diffenc.storage.writing import write_json, writing


class BankWriter:
    """Writes queries shard by shard; a bank appears under its name only when it is complete.

    Args:
        folder: Folder of the bank.
        bank: Digest of everything that the bank is made from.
        shapes: Shape (cells, channels) of the queries of each layer.
        dtype: Floating point type of the stored queries.
        shard_bytes: Approximate largest size of a shard, in bytes; it ends with a whole part.
    """

    def __init__(
        self, folder: Path, bank: str, shapes: Shapes, dtype: torch.dtype, *, shard_bytes: int
    ) -> None:
        self.folder, self.bank, self.shapes, self.dtype = folder, bank, shapes, dtype
        self._shard_bytes = shard_bytes
        self._shards: list[Shard] = []
        self._rows: list[tuple[Tensor, ...]] = []
        self._bytes = 0

    def resume(self, parts: Sequence[int]) -> int:
        """Take over the shards that are whole, and remove what follows them.

        Args:
            parts: Number of rows of each part of the bank.

        Returns:
            Number of parts that are done.
        """
        ends = {end: index for index, end in enumerate(accumulate(parts, initial=0))}
        first = 0
        while (shard := self._whole_shard(len(self._shards), first)) is not None:
            if first + shard.rows not in ends:
                break
            self._shards.append(shard)
            first += shard.rows
        clear(self.folder, keep=[PLAN_FILE, *(shard.file for shard in self._shards)])
        return ends[first]

    def add(self, rows: Sequence[tuple[Tensor, ...]]) -> None:
        """Rows of a part of the bank, each with an entry per layer.

        Raises:
            OutputError: They cannot be written.
        """
        self._rows += rows
        self._bytes += sum(entry.nbytes for row in rows for entry in row)
        if self._bytes >= self._shard_bytes:
            self._flush()

    def finish(self, content: dict[str, Any]) -> None:
        """Write what is left, and the table of contents.

        Raises:
            OutputError: It cannot be written.
        """
        self._flush()
        shards = [asdict(shard) for shard in self._shards]
        whole = {"format": FORMAT, "bank": self.bank, **content, "shards": shards}
        whole["digest"] = json_digest(whole)
        write_json(self.folder / BANK_FILE, whole, indent=1)
        clear(self.folder, keep=[BANK_FILE, *(shard.file for shard in self._shards)])

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if not self._rows:
            return
        tensors = [torch.stack(rows) for rows in zip(*self._rows, strict=True)]
        digest = LayerDigest(len(tensors))
        digest.update(tensors)
        first = sum(shard.rows for shard in self._shards)
        name = shard_name(len(self._shards))
        shard = Shard(file=name, first=first, rows=len(self._rows), digest=digest.hexdigest())
        header = {"bank": self.bank, "first": first, "rows": shard.rows, "digest": shard.digest}
        with writing(self.folder / name) as partial:
            # One entry: the order of several is random, and equal banks shall be equal files.
            save_file(
                {f"layer.{layer}": rows for layer, rows in enumerate(tensors)},
                partial,
                metadata={"shard": json.dumps(header)},
            )
        self._shards.append(shard)
        self._rows, self._bytes = [], 0

    def _whole_shard(self, index: int, first: int) -> Shard | None:
        """The shard that an earlier call wrote, if it is whole and of this bank."""
        from safetensors import safe_open

        path = self.folder / shard_name(index)
        try:
            with safe_open(path, "pt") as opened:
                header = header_of(opened)
                shard = Shard(
                    file=path.name, first=first, rows=header["rows"], digest=header["digest"]
                )
                stored = str(self.dtype).removeprefix("torch.")
                check_shard(opened, shard, bank=self.bank, shapes=self.shapes, dtype=stored)
                digest = LayerDigest(len(self.shapes))
                layers = range(len(self.shapes))
                digest.update([opened.get_tensor(f"layer.{layer}") for layer in layers])
        except Exception:  # whatever is wrong with it, it is written again
            return None
        return shard if digest.hexdigest() == shard.digest else None
