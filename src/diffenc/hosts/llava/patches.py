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

    def replace(self, package: str, name: str, old: Any, new: Any) -> None:
        """Set a name in every loaded module of a package where it stands for `old`."""
        for path, module in list(sys.modules.items()):
            inside = path == package or path.startswith(f"{package}.")
            if inside and getattr(module, "__dict__", {}).get(name) is old:
                self.set(module, name, new)

    def undo(self) -> None:
        """Put everything back."""
        while self._undo:
            owner, name, old, was_own = self._undo.pop()
            if was_own:
                setattr(owner, name, old)
            else:
                delattr(owner, name)
