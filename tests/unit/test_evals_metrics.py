import itertools
import statistics

import pytest
import torch

from diffenc.errors import ShapeError
from diffenc.evals import METRICS, Item, Picture, correct, evaluate, shapes_benchmark
from diffenc.evals.matching.metrics import CHANCE, by_label, overall, tied
from diffenc.evals.results import Result
from evals_data import RandomMatcher


def oracle(table):
    """Text, image and group of one item, from the words of the definition."""
    (s00, s01), (s10, s11) = table  # s of picture, caption
    text = s00 > s01 and s11 > s10
    image = s00 > s10 and s11 > s01
    return text, image, text and image


HAND_MADE = [
    # pictures down, captions across                     text   image  group
    ([[2.0, 1.0], [1.0, 2.0]], (True, True, True)),
    ([[2.0, 1.0], [3.0, 4.0]], (True, False, False)),  # picture 1 wins every caption
    ([[2.0, 3.0], [1.0, 4.0]], (False, True, False)),  # caption 1 wins every picture
    ([[1.0, 2.0], [2.0, 1.0]], (False, False, False)),
    ([[1.0, 1.0], [1.0, 1.0]], (False, False, False)),  # a tie is wrong
    ([[2.0, 2.0], [1.0, 3.0]], (False, True, False)),  # tie of captions
    ([[2.0, 1.0], [2.0, 3.0]], (True, False, False)),  # tie of pictures
    ([[-1.0, -2.0], [-3.0, -1.5]], (True, True, True)),
]


@pytest.mark.parametrize(("table", "expected"), HAND_MADE)
def test_hand_made_tables(table, expected):
    found = correct(torch.tensor([table]))
    assert tuple(bool(found[metric]) for metric in METRICS) == expected == oracle(table)


def test_all_tables_of_three_levels_follow_the_definition_and_group_is_never_more():
    tables = [
        [list(values[:2]), list(values[2:])] for values in itertools.product(range(3), repeat=4)
    ]
    found = correct(torch.tensor(tables, dtype=torch.float32))
    for row, table in enumerate(tables):
        assert tuple(bool(found[metric][row]) for metric in METRICS) == oracle(table)
    rates = {metric: values.float().mean().item() for metric, values in found.items()}
    assert rates["group"] <= min(rates["text"], rates["image"])


def test_chance_counts_the_orders_of_four_numbers():
    tables = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.float32)
    found = correct(tables.unflatten(1, (2, 2)))
    for metric in METRICS:
        assert 100 * found[metric].float().mean().item() == pytest.approx(CHANCE[metric], rel=1e-6)


def test_leading_axes_are_trials():
    scores = torch.randn(3, 5, 2, 2)
    found = correct(scores)
    assert found["group"].shape == (3, 5)
    assert torch.equal(found["text"][1], correct(scores[1])["text"])


@pytest.mark.parametrize("shape", [(2, 2), (4, 2, 3), (4, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ShapeError, match="2 pictures, 2 captions"):
        correct(torch.zeros(shape))


def test_deviations_are_those_of_a_sample():
    # 19.25 of the paper's table: 2, 7 and 7 of 15 pairs
    result = Result((2 / 0.15, 7 / 0.15, 7 / 0.15), 15)
    assert result.std == pytest.approx(statistics.stdev(result.trials))
    assert round(result.std, 2) == 19.25
    assert Result((40.0,), 15).std is None
    assert Result((50.0,), 400).sampling_error == pytest.approx(4.9)


def items(labels):
    blank = Picture("", lambda: b"")
    return [
        Item(str(index), (blank, blank), ("a", "b"), {"pattern": each})
        for index, each in enumerate(labels)
    ]


def test_the_mean_over_labels_weighs_labels_alike():
    found = items([("Color",), ("Color",), ("Color",), ("Text",)])
    right = torch.tensor([[True, True, True, False]])
    every = dict.fromkeys(METRICS, right)
    assert overall(every, found, average="items", label_kind="pattern")["text"].mean == 75
    mean = overall(every, found, average="labels", label_kind="pattern")["text"]
    assert (mean.mean, mean.items) == (50, 4)
    split = by_label(every, found, "pattern")
    assert {name: (r["image"].mean, r["image"].items) for name, r in split.items()} == {
        "Color": (100, 3),
        "Text": (0, 1),
    }


def test_an_item_counts_for_each_of_its_labels_and_for_no_other():
    found = items([("x", "y"), ("y",), ()])
    right = {metric: torch.tensor([[True, False, True]]) for metric in METRICS}
    split = by_label(right, found, "pattern")
    assert {name: results["group"].mean for name, results in split.items()} == {"x": 100, "y": 50}
    assert by_label(right, found, "tag") == {}


def test_random_scores_are_at_chance():
    found = evaluate(shapes_benchmark("winoground", per_label=8), [RandomMatcher()], trials=60)
    results = found.results("random")
    for metric in METRICS:
        # 2400 independent items: a deviation of 0.9 points
        assert abs(results[metric].mean - CHANCE[metric]) < 3.6
    for trial in zip(*(results[metric].trials for metric in METRICS), strict=True):
        assert trial[2] <= min(trial[:2])


def test_ties_are_counted_where_scores_are_compared():
    tables = [[[1, 1], [2, 3]], [[1, 2], [1, 3]], [[1, 2], [3, 1]], [[1, 2], [3, 4]]]
    # equal scores on the diagonal are never compared
    scores = torch.tensor(tables, dtype=torch.float32)
    assert tied(scores).tolist() == [True, True, False, False]
    both = torch.stack([scores, scores.flip(0)])
    assert tied(both).tolist() == [True, True, True, True]
