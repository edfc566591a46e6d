"""Tables of TOML as dataclasses, with errors that name the place."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from diffenc.errors import ConfigError, near_matches
from diffenc.storage import schema

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def table(value: Any, where: str) -> dict[str, Any]:
    """A table as a dict of its own.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a table, got {value!r}")
    return dict(value)


def texts(value: Any, where: str) -> tuple[str, ...]:
    """A list of texts.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{where} must be a list of texts, got {value!r}")
    return tuple(value)


def check_name(name: str, where: str) -> str:
    """A name that can stand in a comparison of figures and in a file name.

    Raises:
        ConfigError: It cannot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}.{name}: names have small letters, digits, '.', '-' and '_', and begin with a "
            "letter or a digit"
        )
    return name


def check_keys(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse keys that are not known.

    Raises:
        ConfigError: There are some.
    """
    if unknown := [key for key in values if key not in known]:
        raise ConfigError(
            f"{where}unknown key {unknown[0]!r}; known are {', '.join(known)}."
            f"{near_matches(unknown[0], known)}"
        )


def check_present(values: Mapping[str, Any], needed: Sequence[str], where: str) -> None:
    """Refuse a table that lacks keys.

    Raises:
        ConfigError: It does.
    """
    if missing := [key for key in needed if key not in values]:
        raise ConfigError(f"{where}{', '.join(missing)} is missing")


def make(kind: Any, values: Mapping[str, Any], where: str, **own: Any) -> Any:
    """Make a dataclass of a table, whose values are checked by the dataclass's annotations.

    Args:
        kind: Dataclass to make.
        values: Values of the table, by key.
        where: Place of the table, for messages.
        own: Values of attributes that the table may not give.

    Raises:
        ConfigError: A key is unknown, or a value is of another type or not allowed.
    """
    check_keys(values, [each.name for each in fields(kind) if each.name not in own], f"{where}: ")
    return schema.make(kind, values, where, own=own)
