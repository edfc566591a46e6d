import statistics

import pytest
import torch
from PIL import Image

from diffenc.errors import ConfigError, MissingExtraError
from diffenc.evals import correct, evaluate, load_mmvp_vlm, shapes_benchmark
from diffenc.evals.matching.draws import draw_study, draw_table
from diffenc.evals.matching.plots import need_plots, plot_draws, plot_timesteps
from diffenc.evals.matching.timesteps import timestep_study, timestep_tables
from evals_data import RandomMatcher, mmvp_vlm

STEPS = (100, 300, 500)


class Parts(RandomMatcher):
    """One score per timestep: right at 300, noise elsewhere."""

    def __call__(self, images, texts, *, seed):
        noise = [super(Parts, self).__call__(images, [*texts, str(t)], seed=seed) for t in STEPS]
        noise[1] = torch.eye(2)
        return torch.stack(noise, dim=-1)


class Noisy(RandomMatcher):
    """A weak truth under strong noise, which averaging brings out."""

    def __call__(self, images, texts, *, seed):
        return 0.5 * torch.eye(2) + super().__call__(images, texts, seed=seed)


@pytest.fixture(scope="module")
def by_timestep():
    return evaluate(shapes_benchmark("mmvp-vlm", per_label=3), [Parts("parts")], trials=2)


@pytest.fixture(scope="module")
def many_trials():
    data = shapes_benchmark("winoground", per_label=12)
    return evaluate(data, [Noisy("noisy")], trials=24)


def test_each_timestep_is_scored_alone_and_the_ensemble_is_the_mean(by_timestep):
    study = timestep_study(by_timestep, "parts", STEPS, (100, 300))
    scores = by_timestep.scores["parts"]
    assert study.overall["300"]["group"].trials == (100, 100)
    for name, each in [
        ("100", scores[..., 0]),
        ("500", scores[..., 2]),
        ("ensemble", (scores[..., 0] + scores[..., 1]) / 2),
    ]:
        right = correct(each)["image"].float()
        # equally many items per pattern: the mean over patterns is that over items
        assert study.overall[name]["image"].trials == pytest.approx(
            (100 * right.mean(dim=1)).tolist()
        )
    assert list(study.labels["100"]) == ["color", "count", "position", "relation", "shape", "size"]
    assert study.to_dict()["overall"]["300"]["text"] == [100, 100]


def test_the_papers_table_has_its_place_beside_the_real_pairs_alone(by_timestep, tmp_path):
    titles = [t.title for t in timestep_tables(timestep_study(by_timestep, "parts", STEPS, STEPS))]
    assert not any(title.startswith("paper") for title in titles)
    real = evaluate(load_mmvp_vlm(mmvp_vlm(tmp_path)), [Parts("parts")], trials=1)
    last = timestep_tables(timestep_study(real, "parts", STEPS, STEPS))[-1]
    assert last.title.startswith("paper, Table 2")
    assert len(last.rows) == 11


def test_an_ensemble_of_other_timesteps_is_refused(by_timestep):
    with pytest.raises(ConfigError, match=r"must be some of the timesteps \[100, 300, 500\]"):
        timestep_study(by_timestep, "parts", STEPS, (189,))
    with pytest.raises(ConfigError, match="each once"):
        timestep_study(by_timestep, "parts", STEPS, (100, 300, 100))
    with pytest.raises(ConfigError, match="for 2 timesteps"):
        timestep_study(by_timestep, "parts", STEPS[:2], STEPS[:1])


def test_noises_are_grouped_without_sharing_any(many_trials):
    study = draw_study(many_trials, "noisy")
    assert [(row.count, row.groups) for row in study.rows] == [
        (1, 24),
        (2, 12),
        (3, 8),
        (4, 6),
        (6, 4),
        (8, 3),
    ]
    singles = [100 * correct(trial)["text"].float().mean().item() for trial in scores_of(study)]
    first = study.rows[0]
    assert first.draws["text"].mean == pytest.approx(statistics.mean(singles))
    assert first.draws["text"].std == pytest.approx(statistics.stdev(singles))
    for row in study.rows:
        assert row.trials["text"].std == pytest.approx(statistics.stdev(singles) / row.count**0.5)


def scores_of(study):
    return study.evaluation.scores[study.model]


def partitions(left):
    """Every way to split into pairs."""
    if not left:
        yield []
        return
    for other in left[1:]:
        for rest in partitions([k for k in left[1:] if k != other]):
            yield [(left[0], other), *rest]


def test_deviations_are_those_of_all_ways_to_group():
    found = evaluate(shapes_benchmark("winoground", per_label=6), [Noisy("noisy")], trials=8)
    row = draw_study(found, "noisy").rows[1]
    scores = found.scores["noisy"]
    variances = []
    for pairs in partitions(list(range(8))):
        means = [(scores[a] + scores[b]) / 2 for a, b in pairs]
        rates = [100 * correct(mean)["image"].float().mean().item() for mean in means]
        variances.append(statistics.variance(rates))
    assert len(variances) == 105
    assert row.count == 2
    assert row.draws["image"].std == pytest.approx(statistics.mean(variances) ** 0.5, rel=0.1)
    assert draw_study(found, "noisy").rows == draw_study(found, "noisy").rows


def test_draws_sharpen_the_score_and_trials_only_the_number(many_trials):
    rows = draw_study(many_trials, "noisy").rows
    for row in rows:
        expected = rows[0].score_deviation / row.count**0.5
        assert row.score_deviation == pytest.approx(expected, rel=0.1)
    assert rows[-1].draws["group"].mean > rows[0].draws["group"].mean + 10
    assert rows[-1].trials["group"].mean == pytest.approx(rows[0].draws["group"].mean, abs=1e-6)
    table = draw_table(draw_study(many_trials, "noisy"))
    assert [row[0] for row in table.rows] == ["1", "2", "3", "4", "6", "8"]


def test_too_few_noises_are_refused():
    found = evaluate(shapes_benchmark("winoground", per_label=1), [RandomMatcher()], trials=5)
    with pytest.raises(ConfigError, match="needs 6 noises or more, got 5"):
        draw_study(found, "random")


@pytest.mark.long
def test_pictures_are_drawn(by_timestep, many_trials, tmp_path):
    pytest.importorskip("matplotlib")
    plot_timesteps(timestep_study(by_timestep, "parts", STEPS, STEPS), tmp_path / "t.png")
    plot_draws(draw_study(many_trials, "noisy"), tmp_path / "d.png")
    for name in ("t.png", "d.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > image.height > 300
            assert len(image.convert("RGB").getcolors(2**24)) > 100


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"needs matplotlib, .*diffenc\[viz\]"):
        need_plots()
