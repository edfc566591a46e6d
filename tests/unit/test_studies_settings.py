import pytest

from diffenc.errors import ConfigError
from diffenc.studies.settings import Done, chance_of, require_distinct


def test_what_is_done_is_added_up_and_told():
    told = []
    done = Done(lambda count, total: told.append((count, total)), 7)
    for count in (2, 4, 1):
        done.add(count)
    assert told == [(2, 7), (6, 7), (7, 7)]
    Done(None, 7).add(3)


@pytest.mark.parametrize("values", [[], [50, 50], ["a", "b", "a"]])
def test_values_are_some_and_each_once(values):
    require_distinct("timesteps", (50, 261))
    with pytest.raises(ConfigError, match="timesteps must be one or more, each once"):
        require_distinct("timesteps", values)


def test_chance_is_the_share_of_the_most_frequent_answer():
    assert chance_of([3, 1, 3, 3]) == 0.75
    assert chance_of([5]) == 1.0
