"""Names exchanged in other people's modules, and put back."""

import sys
from typing import Any


class Patches:
    """What was exchanged, so that it can be undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any, bool]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a module or class."""
        self._undo.append((owner, name, getattr(owner, name, None), name in vars(owner)))
        setattr(owner, name, value)

    def set_bases(self, owner: type, bases: tuple[type, ...]) -> None:
        """Derive a class from others."""
        self._undo.append((owner, "__bases__", owner.__bases__, True))
        owner.__bases__ = bases

    def replace(self, name: str, old: Any, new: Any) -> None:
        """Set a name in every loaded module where it stands for `old`, scripts included."""
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is old:
                self.set(module, name, new)

    @property
    def count(self) -> int:
        """How many names were exchanged so far."""
        return len(self._undo)

    def undo(self, down_to: int = 0) -> None:
        """Put everything back, or what was exchanged after the first `down_to` names."""
        while len(self._undo) > down_to:
            owner, name, old, was_own = self._undo.pop()
            if was_own:
                setattr(owner, name, old)
            else:
                delattr(owner, name)
