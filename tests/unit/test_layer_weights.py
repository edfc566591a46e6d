import pytest
import torch
from jaxtyping import TypeCheckError

from diffenc.errors import ShapeError
from diffenc.scoring.layer_weights import fit_layer_weights, margins


def items(count=64, layers=4, n=2, *, good=None, seed=0):
    scores = torch.randn(count, layers, n, n, generator=torch.Generator().manual_seed(seed))
    if good is not None:
        scores[:, good] += 2 * torch.eye(n)
    return scores


def test_margins_compare_each_right_pair_with_the_wrong_ones():
    scores = torch.tensor([[[[5.0, 1.0], [2.0, 4.0]]]])  # one item, one layer
    assert sorted(margins(scores).flatten().tolist()) == [2, 3, 3, 4]
    assert margins(items(3, 5, 3)).shape == (3 * 2 * 6, 5)


def test_the_layer_that_tells_the_truth_gets_the_weight_whatever_its_scale():
    scores = items(good=2)
    scores[:, 1] *= 1000  # a loud layer that knows nothing
    scores[:, 2] *= 0.01
    weights = torch.tensor(fit_layer_weights(scores))
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 0
    assert weights[2] > 0.9
    assert weights[1] * 1000 < weights[2] * 0.01


def test_what_was_chosen_holds_on_other_items():
    weights = torch.tensor(fit_layer_weights(items(good=2, seed=0)))
    held_out = items(good=2, seed=1)
    chosen = (margins(held_out) @ weights > 0).float().mean()
    equal = (margins(held_out).mean(dim=1) > 0).float().mean()
    assert chosen > equal + 0.05


def test_two_good_layers_share_the_weight():
    scores = items(layers=2, good=0)
    scores[:, 1] += 2 * torch.eye(2)
    assert fit_layer_weights(scores) == pytest.approx((0.5, 0.5), abs=0.15)


def test_layers_that_are_all_wrong_are_weighed_alike_with_a_warning():
    with pytest.warns(UserWarning, match="no layer tells right pairs"):
        assert fit_layer_weights(-10 * torch.eye(2).expand(8, 3, 2, 2)) == pytest.approx(
            [1 / 3] * 3
        )
    with pytest.warns(UserWarning, match="no layer"):
        assert fit_layer_weights(torch.zeros(8, 2, 2, 2)) == (0.5, 0.5)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (4, 3, 1, 1), (4, 3, 2, 3), (3, 2, 2)])
def test_items_are_squares_of_two_or_more(shape):
    with pytest.raises((ShapeError, TypeCheckError), match=r"got|layer_scores"):
        fit_layer_weights(torch.zeros(shape))
