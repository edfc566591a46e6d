"""Claims about figures, written as comparisons: ``"cfg4/oracle/named > cfg1/oracle/named"``.

A figure is named by training, measurement and name. Both sides may be sums and differences of
figures and numbers: ``"plain/honest/named - cure/honest/named < 5"``.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from diffenc.errors import ConfigError
from diffenc.studies.results import Spread

Key = tuple[str, str, str]
"""Training, measurement, figure."""

_EXAMPLE = '"cfg4/oracle/named - cfg4/honest/named > 0"'


@dataclass(frozen=True, slots=True)
class Term:
    """A figure or a number, with its sign.

    Attributes:
        sign: Sign of the term, 1 or -1.
        key: Training, measurement and name of the figure; None for a plain number.
        value: Value of the plain number; unused for a figure.
    """

    sign: int
    key: Key | None
    value: float = 0.0

    def __str__(self) -> str:
        return f"{self.value:g}" if self.key is None else "/".join(self.key)


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim that one sum is larger than another.

    Attributes:
        text: Claim as it was written in the plan.
        terms: Terms whose sum is claimed to be above 0.
    """

    text: str
    terms: tuple[Term, ...]

    @property
    def keys(self) -> tuple[Key, ...]:
        """The figures that decide it, each once."""
        return tuple(dict.fromkeys(term.key for term in self.terms if term.key is not None))

    def excess(self, figure: Callable[[Key], Spread | None]) -> Spread | None:
        """Excess of the side claimed larger, per seed; None if a figure is missing."""
        known = {key: figure(key) for key in self.keys}
        spreads = [spread for spread in known.values() if spread is not None]
        if len(spreads) < len(known):
            return None
        seeds = min(len(spread.values) for spread in spreads)
        return Spread(tuple(sum(self._values(known, seed)) for seed in range(seeds)))

    def _values(self, known: dict[Key, Spread | None], seed: int) -> Iterator[float]:
        for term in self.terms:
            spread = None if term.key is None else known[term.key]
            yield term.sign * (term.value if spread is None else spread.values[seed])


def parse_claim(text: str) -> Claim:
    """Read a comparison.

    Raises:
        ConfigError: It is of another form, or compares no figure.
    """
    words = text.split()
    marks = [index for index, word in enumerate(words) if word in ("<", ">")]
    if len(marks) != 1:
        raise ConfigError(
            f"{text!r} must hold one < or > between blanks, such as {_EXAMPLE}; got {len(marks)}"
        )
    left, right = (_side(text, part) for part in (words[: marks[0]], words[marks[0] + 1 :]))
    more, less = (left, right) if words[marks[0]] == ">" else (right, left)
    terms = (*more, *(Term(-term.sign, term.key, term.value) for term in less))
    claim = Claim(text, terms)
    if not claim.keys:
        raise ConfigError(f"{text!r} compares no figure; write one as training/measurement/name")
    return claim


def _side(text: str, words: list[str]) -> tuple[Term, ...]:
    """Terms between + and - marks."""
    if words[:1] in (["-"], ["+"]):
        words = ["0", *words]
    values, marks = words[::2], words[1::2]
    if len(values) != len(marks) + 1 or any(mark not in ("+", "-") for mark in marks):
        raise ConfigError(
            f"{text!r} must hold figures and numbers with + or - between blanks on both sides, "
            f"such as {_EXAMPLE}"
        )
    signs = [1, *(1 if mark == "+" else -1 for mark in marks)]
    found = (_term(text, sign, word) for sign, word in zip(signs, values, strict=True))
    return tuple(term for term in found if term.key is not None or term.value)


def _term(text: str, sign: int, word: str) -> Term:
    parts = word.split("/")
    if len(parts) == 3 and all(parts):
        return Term(sign, (parts[0], parts[1], parts[2]))
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):  # float() reads "nan", too
        raise ConfigError(
            f"{word!r} in {text!r} is neither a number nor a figure; a figure is written "
            "training/measurement/name"
        )
    return Term(sign, None, value)
