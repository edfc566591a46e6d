"""What code reads beside its arguments: closures, defaults, slots, and names of modules."""

import types
from collections.abc import Iterator
from functools import partial
from typing import Any

_STEADY = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    type,
    bool,
    int,
    float,
    str,
    bytes,
    type(None),
)
"""Kinds of values that may be kept; a name may stand for a model, which nobody shall keep alive."""


def hidden_content(value: object) -> tuple[object, ...] | None:
    """What an object holds outside of its `__dict__`; None for one that has nothing there."""
    if isinstance(value, types.FunctionType):
        cells = value.__closure__ or ()
        return value.__code__, value.__defaults__, value.__kwdefaults__, *map(_in_cell, cells)
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.MethodType):
        return None
    names = _slots(type(value))
    return tuple(getattr(value, name, None) for name in names) if names else None


def _in_cell(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _slots(kind: type) -> tuple[str, ...]:
    names: list[str] = []
    for base in kind.__mro__:
        own = vars(base).get("__slots__", ())
        for name in (own,) if isinstance(own, str) else tuple(own):
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def class_content(kind: type) -> tuple[object, ...]:
    """Methods and settings of a class itself, without those of its bases."""
    return tuple(vars(kind).values())


def is_same(before: tuple[object, ...], now: tuple[object, ...]) -> bool:
    """Whether two rows hold the same objects; none of them is asked what it equals."""
    return len(before) == len(now) and all(one is two for one, two in zip(before, now, strict=True))


class ReadNames:
    """Names of modules that functions read, and what they stand for.

    Functions of the same module that are read are followed. What is looked up in other modules,
    such as `F.scaled_dot_product_attention`, is read there.
    """

    def __init__(self) -> None:
        self._known: set[types.CodeType] = set()
        self._places: dict[tuple[int, str], dict[str, Any]] = {}
        self._values: list[object] | None = None

    def add(self, function: types.FunctionType) -> None:
        """Take in the names that a function reads."""
        waiting = [function]
        while waiting:
            each = waiting.pop()
            if each.__code__ in self._known:
                continue
            self._known.add(each.__code__)
            names, space = list(_names(each.__code__)), each.__globals__
            for name in names:
                if name not in space:
                    continue
                self._add(space, name)
                value = space[name]
                if isinstance(value, types.FunctionType) and value.__globals__ is space:
                    waiting.append(value)
                if isinstance(value, types.ModuleType):
                    self._add_module(value, names, set())

    def _add_module(self, module: types.ModuleType, names: list[str], known: set[int]) -> None:
        """Take in what is read of a module, and of modules in it."""
        known.add(id(module))
        for name in names:
            if name not in vars(module):
                continue
            self._add(vars(module), name)
            inner = vars(module)[name]
            if isinstance(inner, types.ModuleType) and id(inner) not in known:
                self._add_module(inner, names, known)

    def add_class(self, kind: type) -> None:
        """Take in the names that the methods of a class itself read."""
        for value in vars(kind).values():
            for function in _functions(value):
                self.add(function)

    def have_changed(self) -> bool:
        """Whether a name stands for something else than at the last look, or names came in."""
        now = [_kept(space.get(name)) for (_, name), space in self._places.items()]
        before, self._values = self._values, now
        return before is None or not is_same(tuple(before), tuple(now))

    def _add(self, space: dict[str, Any], name: str) -> None:
        self._places.setdefault((id(space), name), space)


def _kept(value: object) -> object:
    return value if isinstance(value, _STEADY) else None


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that code reads, and the functions that are written in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The functions behind a method, a property, or a decorator that says what it wraps."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    parts = (value.fget, value.fset) if isinstance(value, property) else (value,)
    for part in parts:
        inner: Any = part
        while inner is not None:
            if isinstance(inner, types.FunctionType):
                yield inner
            inner = getattr(inner, "__dict__", {}).get("__wrapped__")
