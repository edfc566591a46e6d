"""Tables of JSON and TOML as dataclasses, with types checked and near misses named."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from diffenc.errors import ConfigError, DiffencError, near_matches
from diffenc.storage.names import printable

_NAMES: Mapping[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    bool: ("true or false", "truth values"),
    NoneType: ("null", "nulls"),
}


class _MisfitError(Exception):
    """A value has another type: its place, the type that it should have, and the value."""


def make(
    kind: Any,
    values: Mapping[str, Any],
    where: str = "",
    *,
    own: Mapping[str, Any] | None = None,
    error: type[DiffencError] = ConfigError,
) -> Any:
    """Call a dataclass, or anything with annotated parameters, with the values of a table.

    Lists become tuples where the annotation says so, and whole numbers floats.

    Args:
        kind: Dataclass or function to call.
        values: Values by the name of the parameter.
        where: Path of the table in its file, such as "model.options"; "" is the whole file.
        own: Values of parameters that the table may not give.
        error: Class of the exception that is raised.

    Raises:
        DiffencError: `error`: a key is unknown or missing, or a value has another type.
    """
    own = own or {}
    hints = get_type_hints(kind if hasattr(kind, "__dataclass_fields__") else _function(kind))
    parameters = inspect.signature(kind).parameters
    known = [name for name in parameters if name not in own]
    check_keys(values, known, where, error=error)
    needed = [name for name in known if parameters[name].default is inspect.Parameter.empty]
    check_present(values, needed, where, error=error)
    try:
        fitting = {
            name: fit(value, hints[name], _path(where, name)) for name, value in values.items()
        }
    except _MisfitError as misfit:
        raise error(_sentence(*misfit.args)) from None
    return kind(**own, **fitting)


def check_keys(
    values: Mapping[str, Any],
    known: Iterable[str],
    where: str = "",
    *,
    error: type[DiffencError] = ConfigError,
) -> None:
    """Refuse keys that are not known.

    Raises:
        DiffencError: `error`: there are some; the message tells which ones are near.
    """
    names = list(known)
    if unknown := [key for key in values if key not in names]:
        raise error(
            f"unknown key {printable(_path(where, unknown[0]))}."
            f"{near_matches(str(unknown[0]), names)} Known are {', '.join(names)}"
        )


def check_present(
    values: Mapping[str, Any],
    needed: Iterable[str],
    where: str = "",
    *,
    error: type[DiffencError] = ConfigError,
) -> None:
    """Refuse a table that lacks keys.

    Raises:
        DiffencError: `error`: it does.
    """
    if missing := [_path(where, name) for name in needed if name not in values]:
        raise error(f"a key is missing: {', '.join(missing)}")


def checked(value: Any, hint: Any, where: str, *, error: type[DiffencError] = ConfigError) -> Any:
    """A value that fits an annotation, such as ``list[float]``.

    Raises:
        DiffencError: `error`: it does not fit.
    """
    try:
        return fit(value, hint, where)
    except _MisfitError as misfit:
        raise error(_sentence(*misfit.args)) from None


def fit(value: Any, hint: Any, where: str) -> Any:
    """A value as an annotation has it, or a `_MisfitError`."""
    origin, kinds = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (Union, UnionType):
        return _fit_one(value, hint, where)
    if origin is Literal:
        fits = isinstance(value, (str, NoneType)) and value in kinds
        return value if fits else _refuse(where, hint, value)
    if hint is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if hint is float and isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            _refuse(where, hint, value)
    if _is_table(origin or hint) and isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            _refuse(where, hint, value)
        inner = kinds[1] if kinds else Any
        return {key: fit(each, inner, f"{where}.{key}") for key, each in value.items()}
    if _is_list(origin) and isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return _fit_list(value, hint, where)
    # Python 3.10 takes list[int] for a type.
    plain = origin is None and isinstance(hint, type) and hint not in (int, float)
    return value if plain and isinstance(value, hint) else _refuse(where, hint, value)


def _fit_one(value: Any, hint: Any, where: str) -> Any:
    deeper: _MisfitError | None = None
    for kind in get_args(hint):
        try:
            return fit(value, kind, where)
        except _MisfitError as misfit:
            deeper = misfit if misfit.args[0] != where else deeper
    if deeper is not None:
        raise deeper
    return _refuse(where, hint, value)


def _fit_list(value: Sequence[Any], hint: Any, where: str) -> tuple[Any, ...] | list[Any]:
    kinds = get_args(hint)
    if get_origin(hint) is not tuple or kinds[1:] == (...,):
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        _refuse(where, hint, value)
    pairs = zip(value, kinds, strict=True)
    fitted = [fit(each, kind, f"{where}[{index}]") for index, (each, kind) in enumerate(pairs)]
    return fitted if get_origin(hint) is list else tuple(fitted)


def _refuse(where: str, hint: Any, value: Any) -> Any:
    raise _MisfitError(where, hint, value)


def _sentence(where: str, hint: Any, value: Any) -> str:
    words = [each for each in _words(hint) if isinstance(each, str)]
    near = near_matches(value, words) if isinstance(value, str) and words else ""
    shown = f"{printable(repr(value))} ({type(value).__name__})"
    return f"{where} must be {_named(hint)}, got {shown}{f'.{near}' if near else ''}"


def _words(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return [word for each in get_args(hint) for word in _words(each)]
    return []


def _named(hint: Any, *, several: bool = False) -> str:
    origin, kinds = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_named(each, several=several) for each in kinds if each is not NoneType)
    if origin is Literal:
        return f"one of {list(kinds)}"
    if _is_list(origin):
        exact = origin is tuple and kinds[1:] != (...,)
        inner = _named(kinds[0], several=True)
        return f"a list of {f'{len(kinds)} ' if exact else ''}{inner}"
    if _is_table(origin or hint):
        return "tables" if several else "a table"
    other = str(getattr(hint, "__name__", hint))
    return _NAMES.get(hint, (other, other))[several]


def _is_table(kind: Any) -> bool:
    return kind in (dict, Mapping)


def _is_list(kind: Any) -> bool:
    return kind in (list, tuple, Sequence)


def _path(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)


def _function(kind: Any) -> Any:
    return kind.__init__ if inspect.isclass(kind) else kind
