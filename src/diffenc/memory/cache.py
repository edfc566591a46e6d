"""Bounded caches of values that are needed repeatedly: latents, prompts, unconditional features."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from diffenc.memory.model_state import content_key, state_key

__all__ = ["Entry", "TensorCache", "content_key", "recall", "state_key"]

Entry = tuple[Tensor, ...]

_Key = TypeVar("_Key", bound=Hashable, contravariant=True)
_Value = TypeVar("_Value")


@runtime_checkable
class Store(Protocol[_Key, _Value]):
    """A place where `recall` looks entries up: a `TensorCache`, or a folder of files."""

    def get(self, key: _Key, /) -> _Value | None:
        """Return the entry of a key, or None if there is none."""

    def put(self, key: _Key, value: _Value, /) -> None:
        """Keep a copy of an entry, where there is room."""


def recall(
    cache: "Store[_Key, _Value] | None",
    keys: Sequence[_Key],
    compute: Callable[[list[int]], Iterable[_Value]],
) -> list[_Value]:
    """Look entries up, compute those that are missing in one batch, and put them into the cache.

    Args:
        cache: Store that keeps the entries; None computes every row and keeps nothing.
        keys: One key per row, made of everything that the row's entry depends on, including the
            state of the models; rows with equal keys are computed once.
        compute: Function that is called once with the indices of the missing rows, if there are
            any, and returns their entries in the same order.

    Returns:
        An entry for each row, which may be the cache's own: to be read, never to be written to.
    """
    if cache is None:
        return list(compute(list(range(len(keys)))))
    known: dict[_Key, _Value] = {}
    rows: dict[_Key, int] = {}
    for row, key in enumerate(keys):
        if key in known or key in rows:
            continue
        entry = cache.get(key)
        if entry is None:
            rows[key] = row
        else:
            known[key] = entry
    if rows:
        for key, entry in zip(rows, compute(list(rows.values())), strict=True):
            known[key] = entry
            cache.put(key, entry)
    return [known[key] for key in keys]


class TensorCache:
    """The most recently used results, within a number of bytes.

    An entry larger than the whole cache is not kept. Threads may share a cache.

    Args:
        max_bytes: Largest total size of all entries, in bytes; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = self.nbytes = 0
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Entry | None:
        """Return an entry and mark it as the most recent one, or None; counts a hit or a miss."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return entry

    def put(self, key: Hashable, entry: Entry) -> None:
        """Keep a copy of an entry, and drop the least recent ones that no longer fit."""
        size = sum(tensor.nbytes for tensor in entry)
        if size > self.max_bytes:
            return
        # Nobody else writes to a copy; one made in inference mode could not be trained on later.
        with torch.inference_mode(False):
            entry = tuple(tensor.detach().clone() for tensor in entry)
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = entry
            self.nbytes += size
            while self.nbytes > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.nbytes -= sum(tensor.nbytes for tensor in dropped)

    def clear(self) -> None:
        """Drop every entry; the counts of hits and misses start anew."""
        with self._lock:
            self._entries.clear()
            self.hits = self.misses = self.nbytes = 0

    def __getstate__(self) -> dict[str, int]:
        return {"max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["max_bytes"])  # type: ignore[misc]
