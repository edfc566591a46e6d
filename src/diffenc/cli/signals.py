"""How the program ends when it is interrupted, terminated, or nobody reads what it prints.

It imports nothing of weight, since it must be in place before anything else is loaded.
"""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

BROKEN_PIPE = 141
"""Exit code where the reader of standard output has gone: what a shell makes of SIGPIPE."""

received: int = 0
"""Number of the signal that ends the program; 0 for none."""

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_IMPORTING = "<frozen importlib._bootstrap>"


def exit_code() -> int:
    """Exit code that a shell expects of a program that a signal has ended."""
    return 128 + (received or signal.SIGINT)


def take_over() -> None:
    """End the program by SIGINT or SIGTERM in one line and without a traceback, from now on.

    The files and folders that are being written are cleaned up on the way.
    """
    signal.signal(signal.SIGINT, _stop)
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun ends its processes at once
        signal.signal(signal.SIGTERM, _stop)
    sys.excepthook = _show
    sys.unraisablehook = _show_unraisable


def ignore() -> None:
    """Let the program end, now that its work is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def open_streams() -> None:
    """Give the program standard streams where the shell has closed them.

    Otherwise the next file that is opened takes their number, and receives what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # names of files that are no valid text
        reconfigure(errors="backslashreplace")


def flush() -> int:
    """Write out what was printed; the exit code where that fails, else 0."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            code = BROKEN_PIPE if isinstance(error, BrokenPipeError) else 1
            _drop(stream)
            if code == 1 and stream is sys.stdout:
                reason = getattr(error, "strerror", None) or error
                sys.stderr.write(f"error: cannot write to standard output: {reason}\n")
    return code


def _drop(stream: Any) -> None:
    """Send what is left to nowhere, so that the interpreter does not fail on it again."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):
        return


def _stop(number: int, frame: FrameType | None) -> None:
    global received  # a signal is a matter of the whole process
    if os.getpid() != _PROCESS:  # a worker: its parent says what has to be said
        raise KeyboardInterrupt
    again, received = bool(received), number
    # In the middle of an import an exception may be swallowed, or end the process in C++.
    # Whoever asks twice does not want to wait.
    if again or _importing(frame):
        flush()
        os.write(2, f"{_WORDS.get(signal.Signals(number), 'stopped')}\n".encode())
        os._exit(exit_code())
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not received:
        sys.__excepthook__(kind, error, trace)


def _show_unraisable(unraisable: Any) -> None:
    if not received:
        sys.__unraisablehook__(unraisable)


_PROCESS = os.getpid()
