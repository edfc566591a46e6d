"""Tables become dataclasses with their types checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from diffenc.errors import BackboneError, ConfigError
from diffenc.storage.schema import checked, make


@dataclass(frozen=True, kw_only=True)
class Options:
    name: str
    count: int = 1
    share: float = 0.5
    on: bool = False
    kind: Literal["mean", "max"] = "mean"
    size: int | tuple[int, int] | None = None
    taps: tuple[str, ...] = ()
    parts: Mapping[str, int | None] = field(default_factory=dict)
    more: Sequence[float] = ()


def test_values_fit_with_lists_as_tuples_and_ints_as_floats():
    made = make(
        Options,
        {
            "name": "a",
            "share": 2,
            "kind": "max",
            "size": [3, 4],
            "taps": ["x", "y"],
            "parts": {"p": None, "q": 1},
            "more": [1, 2.5],
        },
    )
    assert made == Options(
        name="a",
        share=2.0,
        kind="max",
        size=(3, 4),
        taps=("x", "y"),
        parts={"p": None, "q": 1},
        more=(1.0, 2.5),
    )
    assert type(made.share) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, r"^model\.name must be a text, got 3 \(int\)"),
        ({"name": None}, "must be a text, got None"),
        ({"count": True}, "count must be a whole number, got True"),
        ({"count": 2.0}, "count must be a whole number"),
        ({"count": "2"}, "count must be a whole number"),
        ({"share": "0.5"}, "share must be a number"),
        ({"share": True}, "share must be a number"),
        ({"share": 10**400}, "share must be a number"),
        ({"on": 1}, "on must be true or false, got 1"),
        ({"kind": "men"}, r"kind must be one of \['mean', 'max'\].*Did you mean 'mean'"),
        ({"kind": ["mean"]}, "kind must be one of"),
        ({"size": [3]}, "size must be a whole number or a list of 2 whole numbers"),
        ({"size": [3, 4, 5]}, "size must be"),
        ({"size": [3, "4"]}, r"size\[1\] must be a whole number"),
        ({"size": False}, "size must be"),
        ({"taps": "mid"}, "taps must be a list of texts, got 'mid'"),
        ({"taps": ["a", 5]}, r"taps\[1\] must be a text, got 5"),
        ({"taps": [["a"]]}, r"taps\[0\] must be a text"),
        ({"taps": {"a": 1}}, "taps must be a list"),
        ({"parts": [1]}, "parts must be a table"),
        ({"parts": {"p": "1"}}, r"parts\.p must be a whole number"),
        ({"parts": {1: 1}}, "parts must be a table"),
        ({"more": [float]}, r"more\[0\] must be a number"),
        ({"cuont": 1}, r"unknown key model\.cuont\. Did you mean 'count'.*Known are name, count"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_what_does_not_fit_is_named_with_its_place(change, message):
    with pytest.raises(BackboneError, match=message):
        make(Options, {"name": "a", **change}, "model", error=BackboneError)


def test_missing_and_given_keys():
    with pytest.raises(ConfigError, match=r"a key is missing: x\.name"):
        make(Options, {}, "x")
    assert make(Options, {}, own={"name": "given"}).name == "given"
    with pytest.raises(ConfigError, match="unknown key name"):
        make(Options, {"name": "other"}, own={"name": "given"})


def test_parameters_of_any_class_are_checked():
    class Layer:
        def __init__(self, width: int, *, groups: Sequence[Sequence[int]] = ((),)) -> None:
            self.width, self.groups = width, groups

    assert make(Layer, {"width": 3, "groups": [[1, 2], []]}).groups == ((1, 2), ())
    with pytest.raises(ConfigError, match=r"groups\[0\]\[1\] must be a whole number"):
        make(Layer, {"width": 3, "groups": [[1, "2"]]})


def test_single_values_are_checked():
    assert checked([1, 2.5], list[float], "x") == [1.0, 2.5]
    assert checked({"a": [1]}, dict[str, Any], "x") == {"a": [1]}
    for value in ("1.0", [1, "a"], [[1]], {"a": 1}, None):
        with pytest.raises(ConfigError, match=r"^x"):
            checked(value, list[float], "x")


def test_a_hostile_value_is_shown_in_one_short_line():
    with pytest.raises(ConfigError) as refused:
        make(Options, {"name": "a", "count": "\n\x1b[31m" * 10_000})
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
