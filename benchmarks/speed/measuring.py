"""Clocks and memory: matrix rate, medians of calls in turn, peaks."""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

Name = TypeVar("Name")

FEWEST_ROUNDS = 3
"""Timed rounds, also where they take longer than they may."""


def matrix_rate(device: torch.device, dtype: torch.dtype, *, side: int | None = None) -> float:
    """Floating point operations a second of a large matrix product, the best of several.

    Args:
        device: Where it runs.
        dtype: Of both factors.
        side: Of the square factors; None takes what is large enough for the device.
    """
    side = side or (8192 if device.type == "cuda" else 2048)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(side, side, generator=generator).to(device, dtype)
    right = torch.randn(side, side, generator=generator).to(device, dtype)
    product = left @ right
    seconds = []
    for _ in range(10 if device.type == "cuda" else 5):
        seconds.append(clock(lambda: torch.mm(left, right, out=product), device)[0])
    return 2 * side**3 / min(seconds)


def fast_dtype(device: torch.device) -> torch.dtype:
    """float16 on CUDA; on a CPU bfloat16 where a product in it is faster than in float32.

    It is measured, with a small product: names of processors and flags of kernels do not tell what
    the library in between makes of them.
    """
    if device.type != "cpu":
        return torch.float16
    half, full = (matrix_rate(device, d, side=512) for d in (torch.bfloat16, torch.float32))
    return torch.bfloat16 if half > 1.5 * full else torch.float32


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Clocks by name; that of the processor leaves out what other programs take."""


def clock(
    call: Callable[[], Any],
    device: torch.device,
    *,
    timer: Callable[[], float] = time.perf_counter,
) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    synchronize(device)
    start = timer()
    result = call()
    synchronize(device)
    return timer() - start, result


def in_turn(
    calls: Mapping[Name, Callable[[int], Callable[[], Any]]],
    device: torch.device,
    *,
    repeats: int,
    first: int = 0,
    limit: float = float("inf"),
    timer: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Seconds of calls that take turns, A B C then C B A, so that a busy machine slows them all.

    Args:
        calls: Per name what prepares call number i, untimed, and returns it.
        device: Which is waited for.
        repeats: Calls per name.
        first: Number of the first call.
        limit: After this many seconds of calls no round begins but the first three.
        timer: Clock; `time.process_time` leaves out what other programs take.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for index in range(repeats):
        if index >= FEWEST_ROUNDS and sum(map(sum, seconds.values())) > limit:
            break
        gc.collect()
        order = list(calls) if index % 2 == 0 else list(calls)[::-1]
        for name in order:
            call = calls[name](first + index)
            seconds[name].append(clock(call, device, timer=timer)[0])
    return seconds


def median(seconds: list[float]) -> float:
    """Of several calls."""
    return statistics.median(seconds)


def forget_peak(device: torch.device) -> None:
    """Let the peak begin at what is held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError, AttributeError):  # what loading freed goes back to the system
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Most bytes since `forget_peak`: of tensors on CUDA, of the whole process on a CPU.

    None where the system does not tell. The peak of the address space is read rather than
    `getrusage`, which a child process inherits from its parent.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def weight_bytes(*modules: torch.nn.Module) -> int:
    """Of the parameters and buffers of modules, those they share counted once."""
    tensors = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            tensors[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return sum(tensors.values())


class Deadline:
    """How much of a number of seconds is left; None is without end."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, infinite without an end."""
        return float("inf") if self._end is None else self._end - time.monotonic()
