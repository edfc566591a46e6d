"""Options of a command, made from the dataclasses that the library's calls take.

Names, types, defaults and help of an option are those of a field and of its line under
"Attributes:"; the field's metadata may hold a `metavar`, the `least` number, and another `flag`.
"""

import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from diffenc.cli.encode import parse_size, parse_timesteps
from diffenc.errors import ConfigError

Command = Callable[..., None]

_ATTRIBUTE = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


def with_fields(
    command: Command, kinds: Mapping[str, type], *, without: Collection[str] = ()
) -> Command:
    """Make a command whose options are the fields of dataclasses, and whatever else it takes.

    Args:
        command: Function that is called with one object for each dataclass, and its own parameters.
        kinds: Dataclass of each parameter that gets an object.
        without: Names of fields that are no options; they keep their defaults.

    Returns:
        The function as the command line calls it.
    """
    options: list[Parameter] = []
    readers: dict[str, dict[str, Callable[[Any], Any]]] = {}
    for parameter, kind in kinds.items():
        hints, helps = get_type_hints(kind), attribute_texts(kind)
        readers[parameter] = {}
        for field in fields(kind):
            if field.name in without:
                continue
            type_, read = _typed(hints[field.name], _flag(field))
            readers[parameter][field.name] = read
            options.append(_option(field, type_, helps.get(field.name, "")))
    own = [each for each in signature(command).parameters.values() if each.name not in kinds]

    @wraps(command)
    def run(**values: Any) -> None:
        objects = {
            parameter: kinds[parameter](
                **{name: read(values.pop(name)) for name, read in readers[parameter].items()}
            )
            for parameter in kinds
        }
        command(**objects, **values)

    positional = [each for each in own if isinstance(_declared(each), type(typer.Argument()))]
    others = [each for each in own if each not in positional]
    shown = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in (*positional, *options, *others)]
    run.__signature__ = Signature(shown)  # type: ignore[attr-defined]  # what Typer looks at
    run.__annotations__ = {each.name: each.annotation for each in shown}
    return run


def attribute_texts(kind: type) -> dict[str, str]:
    """What the docstrings of a class and of its bases say of attributes, each in one line."""
    texts: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        _, _, attributes = inspect.cleandoc(each.__doc__ or "").partition("\nAttributes:\n")
        for name, text in _ATTRIBUTE.findall(attributes):
            texts[name] = " ".join(text.split())
    return texts


def summary_of(kind: type) -> str:
    """The docstring of a class without its sections."""
    return re.split(r"\n(?:Attributes|Args|Raises):\n", inspect.cleandoc(kind.__doc__ or ""))[0]


def split_names(entries: list[str] | None) -> tuple[str, ...] | None:
    """Names of an option that takes commas and repetition."""
    names = tuple(name for entry in entries or () for name in entry.split(",") if name)
    return names or None


def _declared(parameter: Parameter) -> Any:
    return next(iter(getattr(parameter.annotation, "__metadata__", ())), None)


def _flag(field: "Field[Any]") -> str:
    return str(field.metadata.get("flag") or f"--{field.name.replace('_', '-')}")


def _option(field: "Field[Any]", type_: Any, text: str) -> Parameter:
    flags = _flag(field).split("/")
    if type_ == bool | None:
        flags = [f"{flags[0]}/--no-{flags[0].removeprefix('--')}"]
    facts: dict[str, Any] = {
        "metavar": field.metadata.get("metavar"),
        "min": field.metadata.get("least"),
    }
    option = typer.Option(*flags, help=text, **facts)
    default = Parameter.empty if field.default is MISSING else field.default
    annotation = Annotated[type_, option]
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _typed(hint: Any, flag: str) -> tuple[Any, Callable[[Any], Any]]:
    """The type that the command line reads, and the function that makes the field's value of it."""
    members = [each for each in _members(hint) if each is not NoneType]
    if members == [tuple[str, ...]]:
        return list[str] | None, split_names
    if members == [tuple[Path, ...]]:
        return list[Path] | None, lambda entries: tuple(entries) if entries else None
    if members == [tuple[float, ...]]:
        return list[str] | None, lambda entries: _numbers(entries, flag)
    if members == [tuple[int, ...]]:
        return str | None, lambda text: None if text is None else parse_timesteps(text)
    if members == [int, tuple[int, int]]:
        return str | None, lambda text: None if text is None else parse_size(text)
    return hint, lambda value: value


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _numbers(entries: list[str] | None, flag: str) -> tuple[float, ...] | None:
    """``["1,1.5", "7"]`` to ``(1.0, 1.5, 7.0)``."""
    numbers = []
    for entry in split_names(entries) or ():
        try:
            number = float(entry)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"{flag} takes numbers with commas, such as 1,1.5,7; got {entry!r}")
        numbers.append(number)
    if entries and not numbers:
        raise ConfigError(f"{flag} names no number; write it like 1,1.5,7")
    return tuple(numbers) or None
