"""Tokens of a frozen encoder, kept on disk between epochs and runs.

An entry is named by the content of the picture, the prompt, and the encoder. Entries stand in
safetensors files of some dozens; a file is there whole or not at all, and processes write files of
their own, so that several may share a folder.
"""

import hashlib
import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffenc._version import __version__
from diffenc.errors import BackboneError, ConfigError, OutputError
from diffenc.memory.digests import full_digest
from diffenc.mllm.training.config import DataConfig
from diffenc.storage.tensors import read_tensors, tensor_names, write_tensors
from diffenc.storage.writing import make_folder

_SHARD_BYTES = 64 * 2**20


class TokenCache:
    """Tensors by name in a folder, within a number of bytes.

    What does not fit is not kept. Of a data set that is read again and again in another order, that
    keeps more than dropping the oldest would.

    Args:
        folder: Folder of the cache; it is made if it is missing.
        max_bytes: Largest number of bytes that the folder holds, as far as this process has seen
            it.
        shard_bytes: Size in bytes from which on waiting entries are written.

    Attributes:
        hits: Number of entries that were found.
        misses: Number of entries that were not found.

    Raises:
        OutputError: The folder cannot be made.
    """

    def __init__(
        self,
        folder: "str | os.PathLike[str]",
        max_bytes: int,
        *,
        shard_bytes: int = _SHARD_BYTES,
    ) -> None:
        self.folder, self.max_bytes, self.shard_bytes = Path(folder), max_bytes, shard_bytes
        self.hits = self.misses = 0
        self._places: dict[str, Path] = {}
        self._waiting: dict[str, Tensor] = {}
        self._seen: set[Path] = set()
        self.nbytes = 0
        make_folder(self.folder)
        self.refresh()

    def __len__(self) -> int:
        return len(self._places) + len(self._waiting)

    def refresh(self) -> None:
        """Look for files that other processes have written since. Broken ones are passed over."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._seen:
                continue
            self._seen.add(path)
            with suppress(BackboneError, OSError):
                names = tensor_names(path, error=BackboneError)
                self.nbytes += path.stat().st_size
                self._places.update(dict.fromkeys(names, path))

    def get(self, name: str) -> Tensor | None:
        """An entry, or None; counts a hit or a miss."""
        tokens = self._waiting.get(name)
        if tokens is None and name in self._places:
            tokens = self._read(name)
        if tokens is None:
            self.misses += 1
        else:
            self.hits += 1
        return tokens

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep an entry, where there is room.

        Raises:
            OutputError: It cannot be written.
        """
        if name in self._places or name in self._waiting:
            return
        if self.nbytes + tensor.nbytes > self.max_bytes:
            return
        self.nbytes += tensor.nbytes
        self._waiting[name] = tensor.detach().cpu().contiguous().clone()
        if sum(each.nbytes for each in self._waiting.values()) >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OutputError: It cannot be written.
        """
        if not self._waiting:
            return
        stem = f"tokens-{os.getpid()}-{secrets.token_hex(6)}"
        path = self.folder / f"{stem}.safetensors"
        try:
            write_tensors(path, self._waiting)
        except OutputError as error:
            raise OutputError(
                f"cannot write the cache of tokens: {error}. Turn it off "
                '(data.cache = "off") or give it another folder (data.cache_dir)'
            ) from error
        self._seen.add(path)
        self._places.update(dict.fromkeys(self._waiting, path))
        self._waiting.clear()

    def _read(self, name: str) -> Tensor | None:
        try:
            options: dict[str, Any] = {"finite": True, "error": BackboneError}
            tensor = read_tensors(self._places[name], only=lambda each: each == name, **options)[
                name
            ]
        except (BackboneError, KeyError):  # removed or damaged meanwhile
            tensor = None
        if tensor is None or tensor.ndim != 2 or not tensor.is_floating_point():
            del self._places[name]
            return None
        return tensor


def entry_name(encoder: str, picture: str, prompt: str) -> str:
    """Name of the tokens of a picture under a prompt.

    Args:
        encoder: Digest that `encoder_digest` gives.
        picture: Digest of the picture's content.
        prompt: Prompt that the picture is encoded under.
    """
    text = json.dumps([encoder, picture, prompt])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def encoder_digest(encoder: nn.Module, precision: str = "no") -> str:
    """A digest of an encoder's kind, settings and weights, to the last value.

    Another version of diffenc may make other tokens of the same weights, and has another digest.

    Args:
        encoder: Frozen encoder.
        precision: Mixed precision that it runs in.
    """
    return hashlib.blake2b(
        f"{__version__} {precision} {full_digest(encoder)}".encode(), digest_size=16
    ).hexdigest()


def is_frozen(encoder: nn.Module) -> bool:
    """Whether nothing in an encoder trains."""
    return not any(parameter.requires_grad for parameter in encoder.parameters())


def make_cache(data: DataConfig, encoder: nn.Module, run: Path) -> TokenCache | None:
    """The cache of a run that keeps tokens; None where the encoder trains.

    Args:
        data: Options of the data, which say where the cache lies and how large it gets.
        encoder: Encoder of the run.
        run: Folder of the run.

    Raises:
        ConfigError: A cache is requested and the encoder trains.
    """
    if not is_frozen(encoder):
        if data.cache == "on":
            raise ConfigError(
                'data.cache = "on" keeps the tokens of a frozen encoder, and this one trains '
                "(captioner, freeze_clip = false, a way of fusing with weights, or "
                'adapt.unet_rank); use "auto" or "off"'
            )
        return None
    return TokenCache(data.cache_dir or str(run / "cache"), int(data.cache_gb * 1e9))
