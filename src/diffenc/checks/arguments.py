"""Checks of what is passed to public calls: a value of the right kind, or a sentence."""

import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any

from diffenc.errors import ConfigError, DiffencError

_LARGEST = 3.4e38
"""Largest number that float32 holds, the type in which most numbers meet tensors."""

OF_64_BITS = ", of 64 bits at most"
"""End of a sentence about a whole number that torch has no type for."""


def whole(
    name: str,
    value: Any,
    *,
    least: int | None = None,
    most: int | None = None,
    error: type[DiffencError] = ConfigError,
) -> int:
    """A whole number of Python, of 64 bits at most, from one of any library.

    Args:
        name: Name of the argument, for messages.
        value: Value that was passed for the argument.
        least: Smallest number that is allowed; None sets no bound.
        most: Largest number that is allowed; None sets no bound.
        error: Class of the exception that is raised.

    Raises:
        DiffencError: `error`: another kind of value, or a number out of range.
    """
    bounds = "" if least is None else f" of {least} or more"
    bounds = bounds if least is None or most is None else f" from {least} to {most}"
    try:
        number = None if is_truth(value) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # torch has errors of its own
        number = None
    low = number is not None and least is not None and number < least
    high = number is not None and most is not None and number > most
    if number is None or low or high:
        raise error(f"{name} must be an int{bounds}, got {shown(value)}")
    if is_wide(number):
        raise error(f"{name} must be an int{bounds}{OF_64_BITS}, got {shown(value)}")
    return number


def is_wide(value: Any) -> bool:
    """Whether a value is a whole number that torch has no type for: one of more than 64 bits."""
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def wholes(
    name: str, value: Any, *, least: int | None = None, error: type[DiffencError] = ConfigError
) -> tuple[int, ...]:
    """One or several whole numbers in an order; see `whole`."""
    if isinstance(value, (str, bytes, Set, Mapping)) or not isinstance(value, Iterable):
        raise error(f"{name} must be a list or a tuple of ints, got {shown(value)}")
    numbers = tuple(
        whole(f"an entry of {name}", each, least=least, error=error) for each in entries(value)
    )
    if not numbers:
        raise error(f"{name} must hold one int or more, got none")
    return numbers


def number(name: str, value: Any, *, error: type[DiffencError] = ConfigError) -> float:
    """A finite number of Python, from one of any library; what float32 cannot hold is none.

    Raises:
        DiffencError: `error`: another kind of value, NaN or infinity.
    """
    try:
        is_one = isinstance(value, numbers.Real) or hasattr(value, "item")
        real = float(value) if is_one and not is_truth(value) else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):
        real = math.nan
    if not abs(real) <= _LARGEST:
        raise error(f"{name} must be a finite number, got {shown(value)}")
    return real


def flag(name: str, value: Any, *, error: type[DiffencError] = ConfigError) -> bool:
    """True or False; a word or a number is neither.

    Raises:
        DiffencError: `error`: another kind of value.
    """
    if isinstance(value, bool) or type(value).__name__ == "bool_":  # numpy's, by name
        return bool(value)
    raise error(f"{name} must be True or False, got {shown(value)}")


def text(name: str, value: Any, *, error: type[DiffencError] = ConfigError) -> str:
    """One text, of valid Unicode.

    Raises:
        DiffencError: `error`: another kind of value, or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise error(f"{name} must be a text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise error(f"{name} is no valid Unicode text: {shown(value)}") from None
    return value


def texts(name: str, value: Any, *, error: type[DiffencError] = ConfigError) -> tuple[str, ...]:
    """One or several texts in an order.

    Raises:
        DiffencError: `error`: none, a set or a mapping, whose order says nothing, or an entry that
            is no text.
    """
    if isinstance(value, str):
        return (text(name, value, error=error),)
    if isinstance(value, (bytes, bytearray, Set, Mapping)) or not isinstance(value, Iterable):
        raise error(f"{name} must be a text or a list of texts, got {shown(value)}")
    checked_texts = tuple(text(f"an entry of {name}", each, error=error) for each in entries(value))
    if not checked_texts:
        raise error(f"{name} must be one text or more, got none")
    return checked_texts


def sides(name: str, value: Any) -> tuple[int, int]:
    """(height, width), from both or from the side of a square.

    Raises:
        ConfigError: Neither.
    """
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ConfigError(f"{name} must be a positive int or (height, width), got {shown(value)}")
    try:
        height, width = (whole(name, side, least=1, most=2**20) for side in pair)
    except ConfigError:
        raise ConfigError(
            f"{name} must be a positive int or (height, width), got {shown(value)}"
        ) from None
    return height, width


def pair(name: str, value: Any) -> "int | tuple[int, int] | None":
    """A positive int, two of them, or None.

    Raises:
        ConfigError: It is something else.
    """
    if value is None:
        return None
    listed = isinstance(value, (tuple, list))
    try:
        sides = [whole(name, side, least=1) for side in (value if listed else (value,))]
    except ConfigError:
        sides = []
    if len(sides) != (2 if listed else 1):
        raise ConfigError(f"{name} must be a positive int or (height, width), got {shown(value)}")
    return (sides[0], sides[1]) if listed else sides[0]


def shown(value: Any) -> str:
    """A value in messages, on one short line."""
    kind = type(value).__name__
    if isinstance(value, (str, bytes, int, float, bool, type(None), list, tuple, dict, set)):
        line = ascii(value[:60] if isinstance(value, (str, bytes)) else value)
        return line if len(line) <= 80 else f"{line[:77]}..."
    return f"a value of type {kind}"


def entries(value: Iterable[Any]) -> list[Any]:
    """Entries in order; none where a container has no axis to go along, as a tensor may."""
    try:
        return list(value)
    except TypeError:
        return []


def is_truth(value: Any) -> bool:
    """Whether a value is True or False, of Python or numpy."""
    kind = type(value)
    return isinstance(value, bool) or (kind.__module__ == "numpy" and kind.__name__[:4] == "bool")
