"""Bounded caches of what is asked for again and again: latents, prompts, unconditional features."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

Entry = tuple[Tensor, ...]


class TensorCache:
    """The most recently used results, within a number of bytes.

    An entry larger than the whole cache is not kept. Threads may share a cache.

    Args:
        max_bytes: Bound; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = self.nbytes = 0
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Entry | None:
        """The entry, which is now the most recent one, or None; counts a hit or a miss."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return entry

    def put(self, key: Hashable, entry: Entry) -> None:
        """Keep an entry, and drop the least recent ones that no longer fit."""
        size = sum(tensor.nbytes for tensor in entry)
        with self._lock:
            if size > self.max_bytes or key in self._entries:
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


def content_key(values: Tensor) -> bytes:
    """A digest of a tensor's shape, dtype and values."""
    digest = hashlib.blake2b(f"{tuple(values.shape)} {values.dtype}".encode(), digest_size=16)
    digest.update(values.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()


def state_key(module: nn.Module) -> Hashable | None:
    """What a frozen module's results depend on beside its input, or None if it is not frozen.

    It changes with the device, the dtype, autocast, the LoRA adapter in use, and every in-place
    write that autograd counts (optimizer steps, `load_state_dict`). Writes through `.data` are not
    seen: clear the cache after them. None means that nothing may be cached: the module is in
    training mode or has a parameter that requires a gradient.
    """
    writes = 0
    first = None
    for parameter in module.parameters():
        if parameter.requires_grad:
            return None
        first = parameter if first is None else first
        writes += parameter._version
    if module.training or first is None:
        return None
    return str(first.device), str(first.dtype), writes, _autocast(first.device), _adapters(module)


def _autocast(device: torch.device) -> str | None:
    """The dtype that autocast computes in, or None outside of it."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return str(torch.get_autocast_dtype(kind))


def _adapters(module: nn.Module) -> tuple[Hashable, ...]:
    """Per layer of peft's: which adapters are on, and which are merged into the weights."""
    layers: Any = (layer for layer in module.modules() if "lora_A" in layer._modules)
    return tuple(
        (layer._disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters))
        for layer in layers
    )
