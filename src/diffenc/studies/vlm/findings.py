"""Findings of the paper as comparisons of figures, and whether they hold by one stated rule.

A comparison is written ``"cfg4/oracle/named > cfg1/oracle/named"``: a figure is named by training,
measurement and name. Both sides may be sums and differences of figures and numbers, as in
``"plain/honest/named - cure/honest/named < 5"``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from diffenc.errors import ConfigError
from diffenc.evals.results import MOST_UNREAD, not_measured
from diffenc.studies.spreads import Spread

Key = tuple[str, str, str]
"""Training, measurement, figure."""

_EXAMPLE = '"cfg4/oracle/named - cfg4/honest/named > 0"'

Verdict = Literal["holds", "does not show", "opposite", "undecided", "not measured", "not run"]

RULE = f"""\
A finding is one comparison or several, each of a difference that is claimed to be above 0. It is \
taken per seed, and compared with what its deviation over seeds allows: with mean m and sample \
deviation d over n seeds, the comparison **holds** where m exceeds t d / √n, is the **opposite** \
where m is below -t d / √n, and else **does not show**; t is the limit of Student's distribution \
with n - 1 degrees of freedom for one-sided 5 % (2.92 for three seeds). A finding holds where all \
its comparisons do, is the opposite where one of them is, and else does not show. One seed has no \
deviation: then a finding is **undecided**. Where more than {100 * MOST_UNREAD:.0f} % of the \
answers behind a figure cannot be read, or where none of the figures is above what guessing \
reaches, by the same limit, the comparison is **not measured**, whatever the figures say. \
Comparisons are not corrected for their number: of twenty that mean nothing, one may seem to \
hold."""

_LIMITS = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""Limits of Student's distribution, one-sided 5 %, for 1 to 9 degrees of freedom."""
_WITHOUT_READING = ("read", "said", "base", "cider", "chance", "guess", "unread")
"""Figures that count words, or no answers at all, so that an unread answer is not a wrong one."""
GUESSING = {"pairs": "chance", "all": "guess"}
"""Figures that can be guessed, with the figure that says how far guessing gets."""
_NEAR_LIMIT = 3.0
"""Distance from an end of the scale, in points of 100, that counts as near."""


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
        figures = {key: figure(key) for key in self.keys}
        spreads = [spread for spread in figures.values() if spread is not None]
        if len(spreads) < len(figures):
            return None
        seeds = min(len(spread.values) for spread in spreads)
        values = {key: spread.values for key, spread in zip(figures, spreads, strict=True)}
        return Spread(
            tuple(
                sum(
                    term.sign * (values[term.key][seed] if term.key else term.value)
                    for term in self.terms
                )
                for seed in range(seeds)
            )
        )


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
    terms = (_term(text, sign, word) for sign, word in zip(signs, values, strict=True))
    return tuple(term for term in terms if term.key is not None or term.value)


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


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding of the paper, and the comparisons that would show it here.

    Attributes:
        statement: Finding in a sentence.
        paper: Statement of the paper, with its place in it.
        claims: Comparisons that must all hold.
        if_not: Likely reason why the finding may not show in miniature.
    """

    statement: str
    paper: str
    claims: tuple[Claim, ...]
    if_not: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """A comparison, decided.

    Attributes:
        claim: Comparison as it was written in the plan.
        excess: Amount by which the side that is claimed to be larger exceeds the other, per seed;
            None if a figure is missing.
        limit: Number that the mean of the excess must exceed; None for a single seed.
        verdict: Result by the rule `RULE`.
        sides: Figures that were compared, by name.
        unread: Largest percentage of unread answers behind one of the figures, as a mean over
            seeds; None if none of them comes from answers that are read.
        guessed: Whether none of the figures is above what guessing reaches.
    """

    claim: str
    excess: Spread | None
    limit: float | None
    verdict: Verdict
    sides: dict[str, Spread]
    unread: float | None = None
    guessed: bool = False

    @property
    def outcome(self) -> str:
        """The verdict, with its reason where nothing was measured."""
        return _outcome(self.verdict, self.unread)


@dataclass(frozen=True, slots=True)
class DecidedFinding:
    """A finding, decided.

    Attributes:
        finding: Finding as the plan states it.
        decisions: Decision on each claim.
        verdict: Result by the rule `RULE`.
        at_limit: Figures near an end of their scale, where no difference can show.
    """

    finding: Finding
    decisions: tuple[Decision, ...]
    verdict: Verdict
    at_limit: tuple[str, ...] = ()

    @property
    def unread(self) -> float | None:
        """Largest percentage of unread answers behind a comparison; None where none are read."""
        return max(
            (each.unread for each in self.decisions if each.unread is not None), default=None
        )

    @property
    def outcome(self) -> str:
        """The verdict, with its reason where nothing was measured."""
        return _outcome(self.verdict, self.unread)


def _outcome(verdict: Verdict, unread: float | None) -> str:
    if verdict != "not measured":
        return verdict
    reason = None if unread is None else not_measured(unread / 100)
    return reason or "not measured: no better than guessing"


def decide(
    finding: Finding, figure: Callable[[Key], Spread | None], *, answers: bool = False
) -> DecidedFinding:
    """Apply the rule to a finding.

    Args:
        finding: Finding of the plan.
        figure: Function that returns the values of a figure per seed, or None if it was not
            measured.
        answers: Whether figures are of answers that had to be read; shares of those that could not
            be are figures then, named "unread" in place of their own name.
    """
    decisions = tuple(decide_claim(claim, figure, answers=answers) for claim in finding.claims)
    verdicts = {each.verdict for each in decisions}
    weakest: tuple[Verdict, ...] = (
        *("not run", "not measured", "undecided"),
        *("opposite", "does not show"),
    )
    verdict: Verdict = next((each for each in weakest if each in verdicts), "holds")
    at_limit = (
        () if verdict in ("holds", "not measured", "not run") else tuple(_at_a_limit(decisions))
    )
    return DecidedFinding(finding, decisions, verdict, at_limit)


def decide_claim(
    claim: Claim, figure: Callable[[Key], Spread | None], *, answers: bool = False
) -> Decision:
    """Apply the rule to a comparison; see `decide`."""
    sides = {"/".join(key): each for key in claim.keys if (each := figure(key)) is not None}
    excess = claim.excess(figure)
    if excess is None:
        return Decision(claim.text, None, None, "not run", sides)
    limit, unread = limit_of(excess), _unread(claim, figure) if answers else None
    guessed = answers and _is_guessed(claim, figure)
    verdict: Verdict = "does not show"
    if guessed or (unread is not None and not_measured(unread / 100)):
        verdict = "not measured"
    elif limit is None:
        verdict = "undecided"
    elif excess.mean > limit:
        verdict = "holds"
    elif excess.mean < -limit:
        verdict = "opposite"
    return Decision(claim.text, excess, limit, verdict, sides, unread, guessed)


def _unread(claim: Claim, figure: Callable[[Key], Spread | None]) -> float | None:
    """Largest percentage of unread answers that stand behind the figures of a claim."""
    shares = []
    for training, measurement, name in claim.keys:
        figure_name, point, number = name.partition(".")  # "named.2" is of the second pass
        if figure_name in _WITHOUT_READING:
            continue
        shares.append(figure((training, measurement, f"unread{point}{number}")))
    return max((share.mean for share in shares if share is not None), default=None)


def _is_guessed(claim: Claim, figure: Callable[[Key], Spread | None]) -> bool:
    """Whether guessing gets as far as every figure of a claim; False where one has no such mark."""
    for training, measurement, name in claim.keys:
        figure_name, point, number = name.partition(".")
        reached = figure((training, measurement, name))
        by_guessing = figure(
            (training, measurement, f"{GUESSING.get(figure_name, '')}{point}{number}")
        )
        if reached is None or by_guessing is None:
            return False
        pairs = zip(reached.values, by_guessing.values, strict=True)
        above = Spread(tuple(value - guess for value, guess in pairs))
        if above.mean > (limit_of(above) or 0.0):
            return False
    return True


def limit_of(excess: Spread) -> float | None:
    """Limit that the mean of a difference must exceed, from its deviation over seeds."""
    if excess.deviation is None:
        return None
    count = len(excess.values)
    t = _LIMITS[min(count - 1, len(_LIMITS)) - 1]
    return t * excess.deviation / math.sqrt(count)


def _at_a_limit(decisions: tuple[Decision, ...]) -> list[str]:
    """Figures that have no room left: names and means."""
    full = {}
    for decision in decisions:
        if decision.verdict == "holds":
            continue
        for name, spread in decision.sides.items():
            if name.rpartition("/")[2].startswith("cider"):  # has no end
                continue
            if not _NEAR_LIMIT <= spread.mean <= 100 - _NEAR_LIMIT:
                full[name] = f"{name} ({spread.mean:.1f})"
    return list(full.values())
