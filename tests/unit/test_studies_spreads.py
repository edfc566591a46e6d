import pytest

from diffenc.errors import NonFiniteError
from diffenc.studies.spreads import Spread, mean_of, over_seeds, written


def test_a_spread_is_written_as_mean_and_deviation():
    assert f"{Spread((1.0, 2.0, 3.0)):.2f}" == "2.00 ± 1.00"
    assert f"{Spread((1.0, 2.0, 3.0)):+.1f}" == "+2.0 ± 1.0"
    assert f"{Spread((-0.25,)):+.3f}" == "-0.250"
    assert written(Spread((0.5,)).percent, ".1f") == "50.0"
    assert written(None, ".1f", nothing="–") == "–"


def test_differences_and_means_are_taken_within_a_seed():
    one, other = Spread((3.0, 10.0)), Spread((1.0, 11.0))
    assert (one - other).values == (2.0, -1.0)
    assert (one - other).won == "1 of 2"
    assert mean_of([one, other]).values == (2.0, 10.5)
    with pytest.raises(ValueError, match="shorter"):
        one - Spread((1.0,))


def test_figures_of_seeds_are_joined_by_name():
    joined = over_seeds([{"a": 1.0, "b": 2.0}, {"b": 4.0, "a": 3.0}])
    assert joined == {"a": Spread((1.0, 3.0)), "b": Spread((2.0, 4.0))}


@pytest.mark.parametrize("values", [(), (float("nan"),), (1.0, float("inf"))])
def test_what_is_no_number_is_no_figure(values):
    with pytest.raises(NonFiniteError, match="one per seed"):
        Spread(values)
