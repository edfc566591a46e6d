"""Options of commands are the fields of dataclasses: names, types, defaults, help and checks."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from diffenc.cli.fields import Changes, attribute_texts, summary_of, with_fields
from diffenc.config import EncoderConfig
from diffenc.errors import ConfigError
from diffenc.evals.matching.options import MatchOptions
from diffenc.evals.task import AskOptions, option
from diffenc.evals.tasks import ASK_TASKS, MATCH_TASKS
from diffenc.scoring.config import ScorerConfig


@dataclass(frozen=True, kw_only=True)
class Base:
    """What all have.

    Attributes:
        data: Folder of the data,
            wherever it lies.
        limit: Number of items.
    """

    data: str
    limit: int | None = option(metavar="N", least=1)


@dataclass(frozen=True, kw_only=True)
class Given(Base):
    """One sentence.

    And another one.

    Attributes:
        limit: Number of pairs.
        names: Some names.
        scales: Some numbers.
        steps: Some timesteps.
        size: Side.
        files: Some files.
        skip: Go on.
        paper: Show it.
    """

    limit: int | None = option(metavar="N", least=2)
    names: tuple[str, ...] | None = option(flag="--name")
    scales: tuple[float, ...] | None = None
    steps: tuple[int, ...] | None = None
    size: int | tuple[int, int] | None = None
    files: tuple[Path, ...] | None = field(default=None)
    skip: bool = False
    paper: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config.

    Attributes:
        kind: Kind of it; None takes the `model`'s own.
        layers: Layers.
        step: Steps.
        count: Number.
    """

    kind: Literal["a", "b"] | None = None
    layers: str | tuple[str, ...] = "all"
    step: int | tuple[int, ...] = 50
    count: int = 3


def run(kinds, *arguments, without=()):
    """What a command of these dataclasses gets, or its output."""
    calls = []

    def command(where: Annotated[str, typer.Argument()], **objects: Any) -> None:
        calls.append((where, objects))

    def declared(where: Annotated[str, typer.Argument()], first: Any, last: int = 7) -> None:
        command(where, first=first, last=last)

    app = typer.Typer(rich_markup_mode=None)
    app.command()(with_fields(declared, {"first": kinds}, without=without))
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return (calls[0][1]["first"], result) if calls else (None, result)


def test_every_type_of_field_is_read():
    first, _ = run(
        *(Given, "here", "--data", "d", "--limit", 4, "--name", "a,b", "--name", "c"),
        *("--scales", "1,1.5", "--scales", 7, "--steps", "50,261", "--size", "384x512"),
        *("--files", "x", "--files", "y", "--skip", "--no-paper"),
    )
    assert first == Given(
        data="d",
        limit=4,
        names=("a", "b", "c"),
        scales=(1.0, 1.5, 7.0),
        steps=(50, 261),
        size=(384, 512),
        files=(Path("x"), Path("y")),
        skip=True,
        paper=False,
    )


def test_what_is_not_given_has_the_default_of_the_field():
    assert run(Given, "here", "--data", "d")[0] == Given(data="d")


def test_a_field_without_default_must_be_given():
    first, result = run(Given, "here")
    assert (first, result.exit_code) == (None, 2)
    assert "--data" in result.output


@pytest.mark.parametrize("names", ["", ",", " , "])
def test_names_that_are_given_are_names(names):
    _, result = run(Given, "here", "--data", "d", "--name", names)
    assert isinstance(result.exception, ConfigError)
    assert f"an option that takes names got {names!r}" in str(result.exception)


@pytest.mark.parametrize("scales", ["1,x", "nan", "inf"])
def test_numbers_are_numbers(scales):
    _, result = run(Given, "here", "--data", "d", "--scales", scales)
    assert isinstance(result.exception, ConfigError)
    assert "--scales takes numbers with commas" in str(result.exception)


def test_the_least_number_is_checked():
    assert "--limit" in run(Given, "here", "--data", "d", "--limit", 1)[1].output


def test_help_is_the_docstring_and_a_subclass_may_say_more():
    texts = attribute_texts(Given)
    assert texts["data"] == "Folder of the data, wherever it lies."
    assert texts["limit"] == "Number of pairs."
    assert summary_of(Given) == "One sentence.\n\nAnd another one."
    output = run(Given, "--help")[1].output
    assert "Folder of the data, wherever it lies." in " ".join(output.split())
    assert "--name" in output
    assert "--names" not in output


def test_fields_may_be_left_out():
    output = run(Given, "--help", without=("names", "size"))[1].output
    assert "--name" not in output
    assert "--size" not in output


def test_changes_hold_what_is_given_alone():
    changes = Changes(Config, ("kind", "layers", "step", "count"))
    assert run(changes, "here")[0] == {}
    arguments = ("--kind", "b", "--layers", "mid,up", "--step", "1,2", "--count", 5)
    assert run(changes, "here", *arguments)[0] == {
        "kind": "b",
        "layers": ("mid", "up"),
        "step": (1, 2),
        "count": 5,
    }
    assert run(changes, "here", "--kind", "none", "--layers", "all", "--step", 9)[0] == {
        "kind": None,
        "layers": "all",
        "step": 9,
    }


def test_help_of_changes_tells_words_and_defaults_in_no_python():
    output = " ".join(run(Changes(Config, ("kind", "count")), "--help")[1].output.split())
    assert "a|b|none" in output
    assert "Kind of it; default: the model's own." in output
    assert "Number. [default: 3]" in output


@pytest.mark.parametrize(
    "kind", [*ASK_TASKS, *MATCH_TASKS, AskOptions, MatchOptions, EncoderConfig, ScorerConfig]
)
def test_every_field_is_explained(kind):
    texts = attribute_texts(kind)
    assert [each.name for each in fields(kind) if not texts.get(each.name)] == []


def test_names_of_clip_models_may_hold_commas():
    """They are folders too; several are named by repeating the option."""
    from diffenc.cli.fields import _options
    from diffenc.evals.matching.options import MatchOptions

    _, readers = _options(MatchOptions, ())
    assert readers["clip"](["a,b", "c"]) == ("a,b", "c")
    assert readers["clip"]([]) is None
    assert readers["layers"](["a,b", "c"]) == ("a", "b", "c")
