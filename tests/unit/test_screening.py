import pytest
import torch

from diffenc.errors import ConfigError
from diffenc.scoring.screening import successive_halving

STEPS = [(t, 0) for t in (100, 300, 500, 700, 900)]


def table(images=2, texts=16):
    return torch.randn(images, texts, 5, generator=torch.Generator().manual_seed(0))


def screened(values, **options):
    calls = []

    def score(alive, step):
        calls.append(int(alive.sum()))
        index = STEPS.index(step)
        return values[..., index].masked_fill(~alive, torch.nan)

    scores, dropped = successive_halving(score, tuple(values.shape[:2]), STEPS, **options)
    return scores, dropped, calls


def test_half_of_the_candidates_go_after_each_step():
    values = table()
    scores, dropped, calls = screened(values, keep=2)
    assert calls == [32, 16, 8, 4, 4]
    assert (~dropped).sum(dim=1).tolist() == [2, 2]
    kept = ~dropped
    assert torch.equal(scores[kept], values[kept])  # as without screening
    assert torch.isnan(scores[dropped]).any(dim=1).all()


def test_a_clear_winner_survives_wherever_it_stands():
    values = table()
    values[0, 15] += 10
    values[1, 0] += 10
    _, dropped, _ = screened(values, keep=1)
    assert (~dropped).nonzero().tolist() == [[0, 15], [1, 0]]


def test_images_of_a_text_can_be_the_candidates():
    _, dropped, _ = screened(table(images=9, texts=3), keep=4, candidates="images")
    assert (~dropped).sum(dim=0).tolist() == [4, 4, 4]


def test_nothing_is_dropped_where_there_are_no_more_than_are_kept():
    scores, dropped, calls = screened(table(texts=3), keep=3)
    assert not dropped.any()
    assert calls == [6] * 5
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("keep", [0, -1, True])
def test_at_least_one_candidate_is_kept(keep):
    with pytest.raises(ConfigError, match="1 or more candidates"):
        screened(table(), keep=keep)
