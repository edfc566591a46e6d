"""A query bank's files: a table of contents and shards, and the mark of the weights behind them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffenc.cache import content_key
from diffenc.errors import BackboneError, OutputError

BANK_FILE = "bank.json"
_FORMAT = 1
_KEYS = ("backbone", "config", "layers", "names", "shards", "size", "weights")


class BankWriter:
    """Writes queries shard by shard; a bank appears under its name only when it is complete.

    Args:
        folder: Of the bank; it must not exist, or be empty.
        shard_bytes: About how large a shard may become.

    Raises:
        OutputError: The folder holds something, or cannot be written.
    """

    def __init__(self, folder: Path, *, shard_bytes: int) -> None:
        self.folder, self._shard_bytes = folder, shard_bytes
        self._shards: list[dict[str, Any]] = []
        self._rows: list[tuple[Tensor, ...]] = []
        self._bytes = 0
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise OutputError(f"the bank's folder exists and is not empty: {folder}")
            folder.mkdir(parents=True, exist_ok=True)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error

    def add(self, row: tuple[Tensor, ...]) -> None:
        """Queries of one image at one step, an entry per layer.

        Raises:
            OutputError: They cannot be written.
        """
        self._rows.append(row)
        self._bytes += sum(entry.nbytes for entry in row)
        if self._bytes >= self._shard_bytes:
            self._flush()

    def finish(self, content: dict[str, Any]) -> None:
        """Write what is left, and the table of contents.

        Raises:
            OutputError: It cannot be written.
        """
        self._flush()
        whole = {"format": _FORMAT, **content, "shards": self._shards}
        partial = self.folder / f"{BANK_FILE}.partial"
        try:
            partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.folder / BANK_FILE)
        except OSError as error:
            raise OutputError(f"cannot write {partial}: {error.strerror or error}") from error

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if not self._rows:
            return
        name = f"queries-{len(self._shards):05d}.safetensors"
        layers = zip(*self._rows, strict=True)
        tensors = {f"layer.{layer}": torch.stack(rows) for layer, rows in enumerate(layers)}
        try:
            save_file(tensors, self.folder / name)
        except Exception as error:  # safetensors raises errors of its own
            raise OutputError(f"cannot write {self.folder / name}: {error}") from error
        self._shards.append({"file": name, "rows": len(self._rows)})
        self._rows, self._bytes = [], 0


def weights_mark(attentions: Mapping[str, Any]) -> dict[str, Any]:
    """What tells key projections from others: dtype, a digest, and the norm of each layer."""
    weights = [attn.to_k.weight.detach() for attn in attentions.values()]
    digests = torch.tensor([list(content_key(weight.float())) for weight in weights])
    return {
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "digest": content_key(digests).hex(),
        "norms": [round(float(weight.float().norm()), 6) for weight in weights],
    }


def same_weights(built: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether two marks are of the same weights; in different dtypes, as far as norms tell."""
    if built["dtype"] == here["dtype"]:
        return bool(built["digest"] == here["digest"])
    one, other = (torch.tensor(mark["norms"], dtype=torch.float64) for mark in (built, here))
    return len(one) == len(other) and torch.allclose(one, other, rtol=5e-3)


def read_contents(folder: Path) -> dict[str, Any]:
    """The table of contents of a complete bank.

    Raises:
        BackboneError: There is none, or it is broken or of another format.
    """
    path = folder / BANK_FILE
    if not path.is_file():
        raise BackboneError(
            f"there is no complete query bank in {folder}: {BANK_FILE} is missing; build one with "
            "scorer.build_index(images, folder) or diffenc index"
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise BackboneError(
                f"{path} has format {content['format']}, this version reads {_FORMAT}; build the "
                "bank again"
            )
        for key in _KEYS:
            content[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(f"{path} is no table of contents of a query bank: {error!r}") from error
    return content
