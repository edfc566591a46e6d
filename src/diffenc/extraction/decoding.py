"""Pictures decoded by threads, in order, while the model computes."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

from diffenc.errors import DiffencError

Decode = Callable[[int], Any]
"""Function that gives the picture at a place, as the encoder takes it."""

_CHUNK_BYTES = 2**19
_MOST_TOGETHER = 16


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture that a thread has read.

    Attributes:
        place: Place of the picture among all.
        picture: The picture as the encoder takes it; None where it is broken.
        error: Reason why it cannot be read; None where it can.
    """

    place: int
    picture: Any
    error: DiffencError | None = None


def decode_ahead(
    places: Iterable[int], decode: Decode, *, threads: int, ahead: int, together: int = 1
) -> Generator[Decoded]:
    """Pictures in the order of their places, decoded by threads ahead of whoever takes them.

    Args:
        places: Places of the pictures.
        decode: Function that gives the picture at a place. What it raises of diffenc's own errors
            comes with the picture; anything else is raised here.
        threads: Number of threads.
        ahead: Number of pictures, at least, that are decoded or begun beyond the one that was
            taken last. It bounds the memory.
        together: Number of pictures that a thread takes at once.
    """

    def read(chunk: list[int]) -> list[Decoded]:
        return [_read(place, decode) for place in chunk]

    rest = iter(places)
    waiting: deque[Future[list[Decoded]]] = deque()
    most = max(2 * threads, -(-ahead // together) + threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        while True:
            while len(waiting) < most and (chunk := list(islice(rest, together))):
                waiting.append(pool.submit(read, chunk))
            if not waiting:
                return
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(place: int, decode: Decode) -> Decoded:
    try:
        return Decoded(place, decode(place))
    except DiffencError as error:
        return Decoded(place, None, error)


def pictures_together(picture_bytes: int) -> int:
    """Number of pictures that a thread takes at once: several where one is soon done.

    Args:
        picture_bytes: Size of a decoded picture.
    """
    return max(1, min(_MOST_TOGETHER, _CHUNK_BYTES // max(1, picture_bytes)))


def cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux alone
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
