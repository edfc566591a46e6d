"""What scores and answers lose under reuse, on a tiny model and with a language model of words."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffenc import CrossAttnScorer
from diffenc.evals.tables import Table
from diffenc.shapes.pairs import mmvp_pairs
from diffenc.shapes.render import render
from diffenc.studies import reuse_outcomes
from diffenc.studies.reuse_outcomes import rank_agreement, study_reuse_outcomes
from diffenc.studies.reuse_outcomes_page import score_table, to_markdown
from loaded import shared


@pytest.fixture(scope="module")
def pairs():
    return mmvp_pairs(1, seed=974_000)[:2]


@pytest.fixture(scope="module")
def study(tiny_sd_folder, pairs):
    def load(folder, *, device, reuse):
        """A model that says another color with reuse, to every question."""
        said = {None: "red", "down": "red", "middle": "blue"}[reuse]
        return SimpleNamespace(generate=lambda images, texts, **_: [said] * len(texts))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse_outcomes, "mmvp_pairs", lambda count, seed: pairs)
        patch.setattr(reuse_outcomes.DiffusionVLM, "from_pretrained", load)
        return study_reuse_outcomes(
            shared(tiny_sd_folder), vlms=["models/one"], timesteps=(50,), questions=14, seeds=1
        )


@pytest.mark.parametrize("part", ["down", "middle"])
def test_figures_of_scores_are_those_of_the_scores(study, tiny_sd_folder, pairs, part):
    pictures = [render(scene) for pair in pairs for scene in pair.scenes]
    texts = [caption for pair in pairs for caption in pair.captions]
    scorer = CrossAttnScorer(shared(tiny_sd_folder)).with_options(
        preset="denoising-gap", timesteps=(50,)
    )
    exact = scorer(pictures, texts).double().numpy()
    reused = scorer.with_options(reuse=part)(pictures, texts).double().numpy()
    (row,) = [r for r in study.scores if (r.preset, r.part) == ("denoising-gap", part)]
    own = np.arange(4)
    for scores, figure in ((exact, row.exact), (reused, row.reused)):
        right = [scores[k, k] > scores[k, k + 1 - 2 * (k % 2)] for k in own]
        assert figure.mean == pytest.approx(np.mean(right))
    one, two = (each - each.mean(axis=1, keepdims=True) for each in (exact, reused))
    moved = np.linalg.norm(two - one) / np.linalg.norm(one)
    assert row.moved.mean == pytest.approx(moved, rel=1e-4)


def test_agreement_is_the_correlation_of_ranks():
    first = torch.tensor([[0.1, 5.0, 2.0, 3.0]])
    assert rank_agreement(first, first.exp()).item() == pytest.approx(1)
    assert rank_agreement(first, -first).item() == pytest.approx(-1)
    other = torch.tensor([[1.0, 3.0, 2.0, 4.0]])  # ranks differ by 0, 1, 0 and -1
    assert rank_agreement(first, other).item() == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_answers_are_counted_against_the_truth_and_each_other(study):
    (figure,) = study.answers
    assert figure.model == "one"
    assert figure.reused["down"] == figure.exact
    assert figure.changed == {"down": 0, "middle": 1}
    assert len(figure.examples) == 14
    red = [example for example in figure.examples if example["true"] == "red"]
    assert figure.exact == len(red) / 14
    assert {example["middle"] for example in figure.examples} == {"blue"}


def test_the_page_shows_every_score_part_and_answer(study):
    page = to_markdown(study, command="diffenc study reuse-outcomes", made_with="Made here.")
    table = score_table(study)
    assert isinstance(table, Table)
    assert len(table.rows) == 4
    for row in table.rows:
        assert f"| {' | '.join(row)} |" in page
    assert "| one | " in page
    assert page.count("| red | red | blue |") == len(study.answers[0].examples)
