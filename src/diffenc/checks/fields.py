"""Fields of configs and values of tensors, checked and brought to plain values in one place.

numpy's numbers count as numbers, lists as tuples; truth values are no numbers, and NaN and infinity
are none either. Everything else is refused in a sentence.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from diffenc.checks.arguments import OF_64_BITS, is_truth, is_wide, number, whole
from diffenc.errors import ConfigError, DiffencError, NonFiniteError


def conform(instance: Any, where: str = "") -> None:
    """Bring the fields of a frozen dataclass to the types of their annotations.

    Words that are to be chosen from (`Literal`) are left to the class, which knows what to say.

    Args:
        instance: Instance of the dataclass, in its `__post_init__`.
        where: Text that is put before names in messages, such as "model.".

    Raises:
        ConfigError: A value is of another type.
    """
    kind: Any = type(instance)
    hints = _hints(kind)
    for field in fields(instance):
        value = getattr(instance, field.name)
        try:
            plain = _fit(value, hints[field.name])
        except _MisfitError:
            words = _words(hints[field.name]) + (OF_64_BITS if is_wide(value) else "")
            raise ConfigError(f"{where}{field.name} must be {words}, got {value!r}") from None
        if plain is not value:
            object.__setattr__(instance, field.name, plain)


def require_finite(
    values: Any, what: str, remedy: str, *, error: type[DiffencError] = NonFiniteError
) -> None:
    """Raise unless a tensor holds numbers alone.

    Args:
        values: Tensor to be checked.
        what: Description of the tensor, for the message: "features at 'mid_block'".
        remedy: Advice on what to do, for the message.
        error: Class of the exception that is raised.
    """
    if values.is_meta:
        raise ConfigError(f"{what} have no values: the model is on the meta device; load it on one")
    if not bool(values.detach().isfinite().all()):
        raise error(f"{what} hold NaN or infinity in {values.dtype}; {remedy}")


class _MisfitError(Exception):
    """A value is not of a type."""


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fit(value: Any, hint: Any) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or origin is Literal:
        return value
    if origin in (Union, UnionType):
        return _fit_any(value, inner)
    if origin is tuple:
        return _fit_tuple(value, inner)
    if hint is bool:
        if not is_truth(value):
            raise _MisfitError
        return bool(value)
    if hint in (int, float):
        try:
            return whole("", value) if hint is int else number("", value)
        except ConfigError:
            raise _MisfitError from None
    kind = Mapping if origin is not None and issubclass(origin, Mapping) else origin or hint
    if not isinstance(value, kind):
        raise _MisfitError
    return value


def _fit_any(value: Any, hints: tuple[Any, ...]) -> Any:
    if value is None and NoneType in hints:
        return None
    for hint in hints:
        if hint is NoneType or (get_origin(hint) is Literal and not isinstance(value, str)):
            continue
        try:
            return _fit(value, hint)
        except _MisfitError:
            pass
    if all(hint is NoneType or get_origin(hint) is Literal for hint in hints):
        return value
    raise _MisfitError


def _fit_tuple(value: Any, inner: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _MisfitError
    entries = list(value)
    if inner[-1] is not Ellipsis and len(entries) != len(inner):
        raise _MisfitError
    hints = [inner[0]] * len(entries) if inner[-1] is Ellipsis else inner
    plain = tuple(_fit(entry, hint) for entry, hint in zip(entries, hints, strict=True))
    if isinstance(value, tuple) and all(a is b for a, b in zip(plain, value, strict=True)):
        return value
    return plain


def _words(hint: Any) -> str:
    """A type as a sentence names it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(each) for each in inner))
    if origin is Literal:
        return f"one of {list(inner)}"
    if origin is tuple and inner[-1] is Ellipsis:
        one = _words(inner[0]).removeprefix("a ").removeprefix("an ")
        return f"a tuple of {one}s"
    if origin is tuple:
        return "(height, width)" if inner == (int, int) else f"a tuple of {len(inner)}"
    names: dict[Any, str] = {
        int: "an int",
        float: "a finite number",
        bool: "True or False",
        str: "a text",
        NoneType: "None",
    }
    if origin is not None and issubclass(origin, Mapping):
        return "a table of options"
    return names.get(hint, f"a {getattr(hint, '__name__', hint)}")
