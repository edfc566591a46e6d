"""What scores and answers lose under reuse, on a tiny model and with a language model of words."""

import json
import random
from statistics import mean, stdev
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffenc import CrossAttnScorer
from diffenc.errors import ConfigError
from diffenc.evals.tables import Table
from diffenc.shapes.pairs import mmvp_pairs
from diffenc.shapes.render import render
from diffenc.studies import reuse_answers, reuse_outcomes
from diffenc.studies.reuse_answers import (
    AnswerFigure,
    answer_figure,
    loss_over,
    questions_each,
    questions_needed,
)
from diffenc.studies.reuse_outcomes import rank_agreement, study_reuse_outcomes
from diffenc.studies.reuse_outcomes_page import loss_table, score_table, to_markdown
from diffenc.studies.vlm.workshop import trained_models
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
        patch.setattr(reuse_answers.DiffusionVLM, "from_pretrained", load)
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


# What answers lose


def figure(questions, **turned):
    both = {"down": (0, 0), "middle": (0, 0), **turned}
    return AnswerFigure("one", questions, 0.5, {}, {}, both, ())


def test_turned_answers_are_counted_both_ways(monkeypatch, tmp_path):
    """A model that says the truth to every second question, and with reuse to every third."""
    every = {None: 2, "down": 3, "middle": 2}

    def load(_folder, *, device, reuse):
        def generate(images, texts, **_):
            return [
                truth[text] if row % every[reuse] == 0 else "" for row, text in enumerate(texts)
            ]

        return SimpleNamespace(generate=generate)

    posed = []
    ask = reuse_answers.ask_questions

    def note(generate, count, *, seed):
        posed.append(seed)
        questions = ask(lambda images, texts, **_: texts, count, seed=seed)[0]
        truth.update({question.text: question.answer for question in questions})
        return questions, generate([], [question.text for question in questions])

    truth = {}
    monkeypatch.setattr(reuse_answers, "ask_questions", note)
    monkeypatch.setattr(reuse_answers.DiffusionVLM, "from_pretrained", load)
    done = SimpleNamespace(add=lambda count: None)
    one = answer_figure(tmp_path, "one", 3, 12, "cpu", done)
    assert posed == [973_003] * 3  # each model has scenes of its own
    # Rows 2, 4, 8 and 10 turn wrong; 3 and 9 turn right; 0 and 6 stay right.
    assert one.turned == {"down": (4, 2), "middle": (0, 0)}
    assert one.exact == one.reused["middle"] == 6 / 12
    assert one.reused["down"] == 4 / 12


def test_the_loss_is_the_mean_of_paired_differences():
    figures = [figure(100, down=(7, 3)), figure(100, down=(2, 4))]
    loss = loss_over(figures, "down")
    differences = [1] * 9 + [-1] * 7 + [0] * 184
    assert (loss.questions, loss.turned) == (200, (9, 7))
    assert loss.lost == pytest.approx(mean(differences)) == 0.01
    assert loss.by_model.values == pytest.approx((0.04, -0.02))
    low, high = loss.interval
    half = 1.96 * stdev(differences) / 200**0.5
    assert low == pytest.approx(0.01 - half, abs=0.002)
    assert high == pytest.approx(0.01 + half, abs=0.002)


def test_the_interval_has_a_width_where_no_answer_turned():
    low, high = loss_over([figure(50)], "down").interval
    assert low < 0 < high


@pytest.mark.parametrize(("lost", "won"), [(0.02, 0.02), (0.03, 0.01), (0.001, 0.002)])
def test_the_interval_holds_the_true_loss_nineteen_times_of_twenty(lost, won):
    rng = random.Random(0)
    inside = 0
    for _ in range(400):
        drawn = rng.choices((1, -1, 0), (lost, won, 1 - lost - won), k=600)
        loss = loss_over([figure(600, down=(drawn.count(1), drawn.count(-1)))], "down")
        inside += loss.interval[0] <= lost - won <= loss.interval[1]
    assert inside / 400 >= 0.93


def test_as_many_questions_are_asked_as_exclude_a_loss_of_a_point():
    """Drawn at random: of studies in which nothing is lost, four in five exclude the loss."""
    count, rng = questions_needed(0.04), random.Random(1)
    decided = 0
    for _ in range(200):
        drawn = rng.choices((1, -1, 0), (0.02, 0.02, 0.96), k=count)
        turned = (drawn.count(1), drawn.count(-1))
        decided += loss_over([figure(count, down=turned)], "down").verdict == "holds"
    assert 0.7 <= decided / 200 <= 0.9
    for models in (1, 2, 3, 7):
        each = questions_each(models)
        assert count <= models * each < count + 35 * models
        assert each % 35 == 0  # seven kinds of questions, five numbers of objects in turn


@pytest.mark.parametrize(
    ("turned", "verdict"),
    [((10, 12), "holds"), ((190, 20), "opposite"), ((60, 40), "not decided; ")],
)
def test_the_interval_decides(turned, verdict):
    assert loss_over([figure(3000, down=turned)], "down").verdict.startswith(verdict)


def test_the_page_shows_what_is_lost(study):
    page = to_markdown(study, command="diffenc study reuse-outcomes", made_with="Made here.")
    down, middle = loss_table(study).rows
    assert down[:5] == ("down", "14", "0", "0", "+0.00")
    wrong = str(round(14 * study.answers[0].exact))
    assert middle[2] == wrong  # "blue" is never the answer where "red" was
    assert f"| {' | '.join(down)} |" in page


def saved(work, identity, stage="instruct", **what):
    folder = work / "trainings" / f"{stage}-{identity}"
    (folder / "model").mkdir(parents=True)
    (folder / "what.json").write_text(json.dumps(what))
    (folder / "model" / "diffenc_vlm.json").write_text("{}")
    return folder / "model"


def test_trained_models_of_a_work_folder_are_listed_by_training_and_seed(tmp_path, monkeypatch):
    from diffenc.studies.vlm import workshop

    second = saved(tmp_path, "a", study="x", training="cfg", seed=1)
    first = saved(tmp_path, "b", study="x", training="cfg", seed=0)
    other = saved(tmp_path, "c", study="x", training="lora", seed=0)
    saved(tmp_path, "d", stage="align", study="x", training="align", seed=0)
    begun = saved(tmp_path, "e", study="x", training="cfg", seed=2)
    monkeypatch.setattr(workshop, "is_saved", lambda folder: folder != begun)
    models = {"cfg, seed 0": first, "cfg, seed 1": second}
    assert trained_models(tmp_path, "cfg") == models
    assert trained_models(tmp_path) == {**models, "lora, seed 0": other}
    with pytest.raises(ConfigError, match=r"no trained model of the training 'up'.*'cfg', 'lora'"):
        trained_models(tmp_path, "up")
    with pytest.raises(ConfigError, match="it has none"):
        trained_models(tmp_path / "elsewhere")
