"""Entry point of the program `diffenc`.

It loads the commands only when it runs, and after it has made sure that it can be interrupted.
"""

import os
import sys
import warnings
from typing import TYPE_CHECKING

from diffenc.cli import signals

if TYPE_CHECKING:
    from diffenc.cli.app import CommandGroup, app

__all__ = ["CommandGroup", "app", "main"]


def main() -> None:
    """Run the program and exit."""
    signals.take_over()
    warnings.formatwarning = _in_one_line
    # A notice of transformers 4.44 to who writes programs, at every tokenizer.
    warnings.filterwarnings("ignore", "`clean_up_tokenization_spaces` was not set", FutureWarning)
    try:
        signals.open_streams()
        # Read when torch loads. Threads that spin while they wait make the program many times
        # slower beside another one that keeps the cores busy.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from diffenc.cli.app import app

        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = signals.exit_code()
    signals.ignore()
    sys.exit(signals.flush() or (code if isinstance(code, int) else 0))


_shown: set[str] = set()


def _in_one_line(message: object, *_where: object, **_line: object) -> str:
    """A warning as a person at a terminal reads it: the line of code says nothing to them.

    Said once. Python forgets what it has shown each time a library sets its filters aside.
    """
    text = " ".join(str(message).split())
    if text in _shown:
        return ""
    _shown.add(text)
    return f"warning: {text}\n"


if not TYPE_CHECKING:  # hidden from type checkers, which would otherwise accept any name

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import diffenc.cli.app as commands

        return getattr(commands, name)


if __name__ == "__main__":
    main()
