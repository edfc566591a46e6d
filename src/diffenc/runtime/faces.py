"""Faces of packages whose names are imported when they are first used."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: dict[str, Any], homes: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a package that imports each name from its home at first use.

    Args:
        package: Namespace of the package, its `globals()`.
        homes: Module that defines each name, by name.
    """

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        package[name] = getattr(import_module(homes[name]), name)
        return package[name]

    return get
