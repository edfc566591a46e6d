import math

import pytest

from diffenc.errors import ConfigError
from diffenc.studies.spreads import Spread
from diffenc.studies.vlm.findings import Finding, decide, decide_claim, parse_claim


def table(**rows):
    """Figures of `name/m/f` by name."""
    spreads = {(name, "m", "f"): Spread(tuple(values)) for name, values in rows.items()}
    return spreads.get


A_ABOVE_B = parse_claim("a/m/f > b/m/f")


def verdict(a, b):
    return decide_claim(A_ABOVE_B, table(a=a, b=b)).verdict


def test_a_clear_difference_holds_and_its_reverse_is_the_opposite():
    assert verdict([50, 52, 51], [30, 31, 32]) == "holds"
    assert verdict([30, 31, 32], [50, 52, 51]) == "opposite"


def test_a_difference_within_its_deviation_does_not_show():
    assert verdict([50, 30, 40], [35, 38, 36]) == "does not show"
    assert verdict([40, 40, 40], [40, 40, 40]) == "does not show"


def test_seeds_are_paired():
    """Differences are equal in each seed, though seeds differ by far more."""
    assert verdict([10, 50, 90], [8, 47, 88]) == "holds"
    assert verdict([10, 50, 90], [47, 88, 8]) == "does not show"


@pytest.mark.parametrize(
    ("seeds", "t"), [(2, 6.314), (3, 2.920), (4, 2.353), (5, 2.132), (10, 1.833)]
)
def test_the_limit_is_that_of_students_distribution(seeds, t):
    deviation = 4.0
    spread = [deviation * (-1) ** k for k in range(seeds)]
    mean = sum(spread) / seeds
    spread = [value - mean for value in spread]
    d = math.sqrt(sum(v * v for v in spread) / (seeds - 1))
    limit = t * d / math.sqrt(seeds)
    zero = [0.0] * seeds
    assert verdict([v + 1.01 * limit for v in spread], zero) == "holds"
    assert verdict([v + 0.99 * limit for v in spread], zero) == "does not show"
    assert verdict([v - 1.01 * limit for v in spread], zero) == "opposite"


def test_one_seed_decides_nothing():
    assert verdict([90], [10]) == "undecided"


def test_a_missing_figure_is_not_run():
    assert decide_claim(A_ABOVE_B, table(a=[1, 2, 3])).verdict == "not run"


def test_a_bound_must_be_kept_beyond_the_deviation():
    """A cost of at most 5 is shown by a mean that is clearly below 5."""
    claim = parse_claim("a/m/f - b/m/f < 5")
    assert decide_claim(claim, table(a=[52, 51, 53], b=[50, 50, 51])).verdict == "holds"
    assert decide_claim(claim, table(a=[60, 50, 55], b=[50, 50, 51])).verdict == "does not show"
    assert decide_claim(claim, table(a=[70, 71, 72], b=[50, 50, 51])).verdict == "opposite"


def test_sums_on_both_sides():
    claim = parse_claim("a/m/f - b/m/f > c/m/f - 1.5 + b/m/f")
    found = decide_claim(claim, table(a=[10, 20], b=[1, 2], c=[3, 4]))
    assert found.excess.values == (10 - 1 - 3 + 1.5 - 1, 20 - 2 - 4 + 1.5 - 2)


def test_a_leading_minus_is_read():
    found = decide_claim(parse_claim("- a/m/f < 3"), table(a=[1, 2]))
    assert found.excess.values == (4, 5)


@pytest.mark.parametrize(
    ("claims", "wanted"),
    [
        (["a/m/f > b/m/f", "a/m/f > c/m/f"], "holds"),
        (["a/m/f > b/m/f", "b/m/f > a/m/f"], "opposite"),
        (["a/m/f > b/m/f", "c/m/f > d/m/f"], "does not show"),
        (["a/m/f > b/m/f", "a/m/f > missing/m/f"], "not run"),
    ],
)
def test_a_finding_holds_where_all_its_comparisons_do(claims, wanted):
    figures = table(a=[60, 61, 62], b=[10, 11, 10], c=[20, 30, 25], d=[25, 20, 30])
    finding = Finding("A is best.", "table 0", tuple(map(parse_claim, claims)), "why not")
    assert decide(finding, figures).verdict == wanted


def test_figures_at_an_end_of_their_scale_are_named_unless_the_finding_holds():
    finding = Finding("A is above b.", "", (A_ABOVE_B,))
    full = decide(finding, table(a=[99, 98, 100], b=[99, 99, 98]))
    assert full.verdict == "does not show"
    assert [each.split()[0] for each in full.at_limit] == ["a/m/f", "b/m/f"]
    assert decide(finding, table(a=[99, 98, 100], b=[1, 2, 1])).at_limit == ()


def test_cider_has_no_end_of_its_scale():
    claim = parse_claim("a/m/cider > 200")
    spread = {("a", "m", "cider"): Spread((190.0, 200.0, 205.0))}
    assert decide(Finding("", "", (claim,)), spread.get).at_limit == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/m/f", "one < or >"),
        ("a/m/f > b/m/f > c/m/f", "got 2"),
        ("a/m/f>b/m/f", "one < or >"),
        ("a/m > 3", "neither a number nor a figure"),
        ("a/m/f * 2 > 3", "with \\+ or -"),
        ("a/m/f > ", "with \\+ or -"),
        ("a/m/f b/m/f > 1", "with \\+ or -"),
        ("3 > 2", "compares no figure"),
        ("a//f > 2", "neither"),
    ],
)
def test_claims_of_another_form_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_claim(text)


def answered(unread, name="f"):
    """Figures of two trainings that differ clearly, and the unread answers behind the second."""
    clear = {("a", "m", name): [50.0, 52.0, 51.0], ("b", "m", name): [30.0, 31.0, 32.0]}
    shares = {("b", "m", name.replace("f", "unread")): unread}
    return {key: Spread(tuple(values)) for key, values in {**clear, **shares}.items()}.get


@pytest.mark.parametrize(
    ("unread", "outcome"),
    [
        ([19.0, 18.0, 20.0], "holds"),
        ([20.0, 20.0, 20.0], "holds"),
        ([21.0, 20.0, 22.0], "not measured: 21 % of answers unread"),
        ([0.0, 60.0, 70.0], "not measured: 43.3 % of answers unread"),
    ],
)
def test_above_a_fifth_of_unread_answers_nothing_is_decided(unread, outcome):
    decided = decide(Finding("s", "p", (A_ABOVE_B,)), answered(unread))
    assert decided.outcome == outcome
    assert decided.verdict == outcome.partition(":")[0]
    assert decided.unread == pytest.approx(sum(unread) / 3)
    assert decided.decisions[0].outcome == outcome
    assert decided.decisions[0].sides.keys() == {"a/m/f", "b/m/f"}  # figures stay to be seen


def test_the_unread_answers_are_those_of_the_pass_that_is_compared():
    claim = parse_claim("a/m/f.2 > b/m/f.2")
    assert decide_claim(claim, answered([21.0] * 3, "f.2")).verdict == "not measured"
    assert decide_claim(claim, answered([19.0] * 3, "f.2")).verdict == "holds"


def test_one_comparison_that_was_not_measured_leaves_the_finding_unmeasured():
    claims = (A_ABOVE_B, parse_claim("a/m/f < 1"))
    assert decide(Finding("s", "p", claims), answered([30.0] * 3)).verdict == "not measured"
    assert decide(Finding("s", "p", (claims[1],)), answered([30.0] * 3)).verdict == "opposite"


def test_figures_that_count_words_need_no_answer_to_be_read():
    claim = parse_claim("a/m/said > b/m/said")
    figures = answered([100.0] * 3)
    values = {
        ("a", "m", "said"): figures(("a", "m", "f")),
        ("b", "m", "said"): figures(("b", "m", "f")),
    }
    decision = decide_claim(claim, lambda key: values.get(key, figures(key)))
    assert (decision.verdict, decision.unread) == ("holds", None)
