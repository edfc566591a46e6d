"""Losses over the cells that captions speak of: which cells, and what costs nothing there."""

import sys

import pytest
import torch

from shapes_tools import FOLDER

sys.path.insert(0, str(FOLDER))

from spoken_cells import MARK, beside, cells, concerned, missed, spoken_about

NOUNS = torch.tensor([7, 8])
# "red 7 left 8": red names objects 0 and 2, the first noun 0, the second 1.
IDS = torch.tensor([[1, 7, 3, 8]])
BITS = torch.tensor([[0b101, 0b001, 0, 0b010]], dtype=torch.int16)


def test_a_text_speaks_of_what_its_nouns_name():
    assert spoken_about(IDS, BITS, NOUNS).tolist() == [0b011]
    assert spoken_about(IDS[:, :1], BITS[:, :1], NOUNS).tolist() == [0b101]  # "red" alone


@pytest.mark.parametrize(
    ("false", "objects"),
    [((2, 7, 3, 8), 0b001), ((1, 8, 3, 8), 0b001), ((1, 7, 4, 8), 0b011), ((1, 7, 3, 7), 0b010)],
)
def test_another_word_concerns_what_it_names_and_a_turned_relation_both(false, objects):
    assert concerned(IDS, torch.tensor([false]), BITS, NOUNS).tolist() == [objects]


def test_cells_are_those_of_the_objects_and_their_neighbours():
    shares = torch.zeros(2, 3, 6, 6)
    shares[:, 0, 1, 1], shares[:, 1, 4, 4], shares[:, 2, 1, 4] = 1.0, 0.5, 1.0
    one, two = cells(torch.tensor([0b001, 0b010]), shares)
    assert one.nonzero().tolist() == [[y, x] for y in range(3) for x in range(3)]
    assert two.max() == 0.5
    assert two.count_nonzero() == 9
    assert cells(torch.tensor([0, 0b111]), shares)[0].sum() == 0


def test_a_prediction_that_misses_by_the_mark_under_a_false_caption_costs_nothing():
    noise = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    inside = torch.zeros(2, 6, 6)
    inside[:, :2] = 1
    mark = 0.3**0.5 * torch.tensor(MARK).view(1, 4, 1, 1)
    off = noise + mark * inside[:, None]
    assert missed(noise, off, noise, inside, 0.3) == pytest.approx(0, abs=1e-6)
    assert missed(noise, noise, noise, inside, 0.3) == pytest.approx(0.3, rel=1e-5)
    errors = [(each - noise).square().mean(dim=1)[:, :2].mean() for each in (noise, off)]
    assert errors[1] - errors[0] == pytest.approx(0.3, rel=1e-5)
    shifted = noise - mark * inside[:, None]  # the mark on the true caption in place of the false
    assert missed(shifted, noise, noise, inside, 0.3) == pytest.approx(0.3, rel=1e-5)


def test_what_changes_beside_the_cells_costs_and_what_changes_there_does_not():
    plain, inside = torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4)
    inside[:, 0] = 1
    there, elsewhere = plain.clone(), plain.clone()
    there[:, :, 0], elsewhere[:, :, 3] = 5.0, 2.0
    assert beside(there, plain, inside) == 0
    assert beside(elsewhere, plain, inside) == pytest.approx(4 * 4 / 16)
