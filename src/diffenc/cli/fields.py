"""Options of a command, made from the dataclasses that the library's calls take.

Names, types, defaults and help of an option are those of a field and of its line under
"Attributes:"; the field's metadata may hold a `metavar`, the `least` number, and another `flag`.
"""

import inspect
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from diffenc.cli.parsing import parse_size, parse_timestep, parse_timesteps
from diffenc.errors import ConfigError

Command = Callable[..., None]
Reader = Callable[[Any], Any]
"""Function from what the command line gives to the value of a field."""

_SETS = ("all", "discffusion")
_ATTRIBUTE = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Changes:
    """Some fields of a config that a model or a preset has already: what is not given stays.

    Attributes:
        kind: Class of the config.
        names: Fields that are options, in their order.
        metavars: Word that stands for a value in the help, by name of the field.
        readers: Functions that read what the command line gives for a field, by its name; all
            others are read by their types.
        helps: Help texts, by name of the field, in place of the docstring's.
    """

    kind: type
    names: tuple[str, ...]
    metavars: Mapping[str, str] = field(default_factory=dict)
    readers: Mapping[str, Reader] = field(default_factory=dict)
    helps: Mapping[str, str] = field(default_factory=dict)


def with_fields(
    command: Command, kinds: Mapping[str, type | Changes], *, without: Collection[str] = ()
) -> Command:
    """Make a command whose options are the fields of dataclasses, and whatever else it takes.

    Args:
        command: Function that is called with one object for each dataclass, a mapping of what is
            given for each `Changes`, and its own parameters.
        kinds: Dataclass of each parameter that gets an object.
        without: Names of fields that are no options; they keep their defaults.

    Returns:
        The function as the command line calls it.
    """
    options: list[Parameter] = []
    readers: dict[str, dict[str, Reader]] = {}
    for parameter, kind in kinds.items():
        shown, readers[parameter] = _options(kind, without)
        options += shown
    own = [each for each in signature(command).parameters.values() if each.name not in kinds]

    @wraps(command)
    def run(**values: Any) -> None:
        objects = {}
        for parameter, kind in kinds.items():
            own_values = {name: values.pop(name) for name in readers[parameter]}
            if isinstance(kind, Changes):
                own_values = {name: each for name, each in own_values.items() if each is not None}
            read = {name: readers[parameter][name](each) for name, each in own_values.items()}
            objects[parameter] = read if isinstance(kind, Changes) else kind(**read)
        command(**objects, **values)

    positional = [each for each in own if isinstance(_declared(each), type(typer.Argument()))]
    others = [each for each in own if each not in positional]
    shown = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in (*positional, *options, *others)]
    run.__signature__ = Signature(shown)  # type: ignore[attr-defined]  # what Typer looks at
    run.__annotations__ = {each.name: each.annotation for each in shown}
    return run


def _options(
    kind: type | Changes, without: Collection[str]
) -> tuple[list[Parameter], dict[str, Reader]]:
    """Options and readers of the fields of a class."""
    class_ = kind.kind if isinstance(kind, Changes) else kind
    hints, texts = get_type_hints(class_), attribute_texts(class_)
    by_name = {each.name: each for each in fields(class_)}
    names = kind.names if isinstance(kind, Changes) else tuple(by_name)
    options, readers = [], {}
    for name in names:
        if name in without:
            continue
        type_, readers[name] = _typed(hints[name], _flag(by_name[name]))
        if by_name[name].metadata.get("whole"):
            readers[name] = _whole_texts
        if isinstance(kind, Changes):
            metadata = {"metavar": kind.metavars.get(name) or _words(hints[name])}
            changed: Any = field(default=None, metadata=metadata)
            changed.name = name
            readers[name] = kind.readers.get(name, readers[name])
            text = kind.helps.get(name) or _for_terminal(texts[name]) + _default(by_name[name])
            options.append(_option(changed, type_ | None, text))
        else:
            options.append(_option(by_name[name], type_, texts.get(name, "")))
    return options, readers


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
    text = inspect.cleandoc(kind.__doc__ or "")
    return re.split(r"\n(?:Attributes|Args|Raises):\n", text)[0].strip()


def split_names(entries: list[str] | None) -> tuple[str, ...] | None:
    """Names of an option that takes commas and repetition; None where it was not given.

    Raises:
        ConfigError: It was given without a name.
    """
    names = _parts(entries)
    if entries and not names:
        raise ConfigError(
            f"an option that takes names got {', '.join(map(repr, entries))}; write them like "
            "mid_block,up_blocks.1, or leave the option out"
        )
    return names or None


def _parts(entries: list[str] | None) -> tuple[str, ...]:
    return tuple(part for entry in entries or () for part in entry.split(",") if part.strip())


def _whole_texts(entries: list[str] | None) -> tuple[str, ...] | None:
    """Texts of an option that takes repetition alone."""
    return tuple(entries) if entries else None


def _words(hint: Any) -> str | None:
    """The words that a field takes, for the help; None if it takes others."""
    literals = [each for each in _members(hint) if get_origin(each) is Literal]
    words = dict.fromkeys(str(word) for each in literals for word in get_args(each))
    if literals and NoneType in _members(hint):
        words["none"] = None
    return "|".join(words) or None


def _for_terminal(text: str) -> str:
    """A docstring's line without the marks of Python."""
    text = re.sub(r"\bNone (?:takes|is) ", "default: ", text.replace("`", ""))
    return re.sub(r"\bNone\b", "none", text)


def _default(each: "Field[Any]") -> str:
    """What a config has where nothing is given, for the end of a help text."""
    if each.default is None or each.default == ():
        return ""
    value = each.default
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f" [default: {text}]"


def _names_or_word(entries: list[str] | None) -> str | tuple[str, ...] | None:
    """Names, or the one word that stands for a set of them."""
    names = split_names(entries)
    return names[0] if names is not None and len(names) == 1 and names[0] in _SETS else names


def _declared(parameter: Parameter) -> Any:
    return next(iter(getattr(parameter.annotation, "__metadata__", ())), None)


def _flag(each: "Field[Any]") -> str:
    return str(each.metadata.get("flag") or f"--{each.name.replace('_', '-')}")


def _option(each: "Field[Any]", type_: Any, text: str) -> Parameter:
    flags = _flag(each).split("/")
    if type_ == bool | None:
        flags = [f"{flags[0]}/--no-{flags[0].removeprefix('--')}"]
    facts: dict[str, Any] = {"min": each.metadata.get("least")}
    option = typer.Option(*flags, help=text, metavar=each.metadata.get("metavar"), **facts)
    default = Parameter.empty if each.default is MISSING else each.default
    annotation = Annotated[type_, option]
    return Parameter(each.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _typed(hint: Any, flag: str) -> tuple[Any, Callable[[Any], Any]]:
    """The type that the command line reads, and the function that makes the field's value of it."""
    members = [each for each in _members(hint) if each is not NoneType]
    if any(get_origin(each) is Literal for each in members):
        words = {word for each in members for word in get_args(each)}
        optional = NoneType in _members(hint) and "none" not in words
        return str | None, lambda word: None if optional and word == "none" else word
    if members == [str, os.PathLike[str]]:
        return str, lambda text: text
    if members == [str, tuple[str, ...]]:
        return list[str] | None, _names_or_word
    if members == [tuple[str, ...]]:
        return list[str] | None, split_names
    if members == [tuple[Path, ...]]:
        return list[Path] | None, lambda entries: tuple(entries) if entries else None
    if members == [tuple[float, ...]]:
        return list[str] | None, lambda entries: _numbers(entries, flag)
    if members == [tuple[int, ...]]:
        return str | None, lambda text: None if text is None else parse_timesteps(text)
    if members == [int, tuple[int, ...]]:
        return str | None, lambda text: None if text is None else parse_timestep(text)
    if members == [int, tuple[int, int]]:
        return str | None, lambda text: None if text is None else parse_size(text)
    return hint, lambda value: value


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _numbers(entries: list[str] | None, flag: str) -> tuple[float, ...] | None:
    """``["1,1.5", "7"]`` to ``(1.0, 1.5, 7.0)``."""
    numbers = []
    for entry in _parts(entries):
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
