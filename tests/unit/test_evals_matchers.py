import pytest
import torch

from diffenc import CrossAttnScorer, DiffusionEncoder
from diffenc.errors import ConfigError
from diffenc.evals import evaluate, shapes_benchmark
from diffenc.evals.matching.contenders import load_matchers
from diffenc.evals.matching.matchers import (
    ScorerMatcher,
    scorer_matchers,
    short_name,
    weights_digest,
)
from diffenc.evals.matching.options import MatchOptions
from evals_data import picture

IMAGES = [picture(0, 0), picture(1, 1)]
TEXTS = ["a red circle", "a blue square"]


@pytest.fixture
def scorer(tiny_sd_folder):
    return CrossAttnScorer.from_pretrained(tiny_sd_folder, preset="paper", timesteps=(100, 700))


def test_scores_are_the_scorers(scorer):
    matcher = ScorerMatcher(scorer, name="paper")
    torch.testing.assert_close(
        matcher(IMAGES, TEXTS, seed=3), scorer(IMAGES, TEXTS, seed=3), rtol=0, atol=0
    )
    parts = ScorerMatcher(scorer, by_timestep=True)(IMAGES, TEXTS, seed=3)
    assert parts.shape == (2, 2, 2)
    torch.testing.assert_close(
        parts.mean(dim=2), scorer(IMAGES, TEXTS, seed=3), rtol=1e-5, atol=1e-6
    )
    for index, timestep in enumerate((100, 700)):
        alone = scorer.with_options(timesteps=(timestep,))(IMAGES, TEXTS, seed=3)
        torch.testing.assert_close(parts[..., index], alone, rtol=1e-5, atol=1e-6)


def test_cut_texts_are_counted_and_not_warned_of(scorer):
    matcher = ScorerMatcher(scorer)
    texts = ["a red circle", "circle " * 80]
    assert list(matcher.truncated(texts)) == [0, 80 + 2 - 77]
    matcher(IMAGES, texts, seed=0)  # warnings are errors


def test_sdxl_counts_by_both_tokenizers(tiny_sdxl_folder):
    scorer = CrossAttnScorer.from_pretrained(tiny_sdxl_folder, preset="paper", timesteps=(100,))
    assert list(ScorerMatcher(scorer).truncated(["circle " * 76])) == [1]


def test_layers_are_for_the_presets_that_read_them(tiny_sd_folder):
    benchmark = shapes_benchmark("winoground", per_label=1)
    options = {"model": str(tiny_sd_folder), "layers": ("mid_block",), "device": "cpu"}
    both = MatchOptions(presets=("diffusion-classifier", "paper"), **options)
    error, attention = load_matchers(benchmark, both)
    assert attention.scorer.config.layers == ("mid_block",)
    assert error.description["config"]["layers"] == "all"
    alone = MatchOptions(presets=("diffusion-classifier",), **options)
    with pytest.raises(ConfigError, match="--layers belongs to scores by attention"):
        load_matchers(benchmark, alone)


def test_an_adapter_counts_with_its_scale_and_only_where_it_is_used(tiny_sd_folder):
    used, aside = [], []
    for alpha in (2, 8):
        encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder)
        encoder.add_lora(rank=2, alpha=alpha)
        for parameter in encoder.trainable_parameters():
            torch.nn.init.constant_(parameter, 0.1)
        used.append(weights_digest(encoder.backbone.parts().items()))
        encoder.set_lora(None)
        aside.append(weights_digest(encoder.backbone.parts().items()))
    assert used[0] != used[1]
    assert aside[0] == aside[1] != used[0]


def test_a_description_names_what_scores_depend_on(scorer):
    described = ScorerMatcher(scorer).description
    assert described["config"]["timesteps"] == [100, 700]
    assert "seed" not in described["config"]
    assert "batch_size" not in described["config"]
    assert described["dtype"] == "float32"
    same = ScorerMatcher(scorer.with_options(seed=9, batch_size=3)).description
    assert same == described
    assert ScorerMatcher(scorer.with_options(lse_lambda=2.0)).description != described


def test_weights_are_told_apart():
    module = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.Linear(40, 2))
    before = weights_digest([("a", module)])
    assert before == weights_digest([("a", module)])
    assert before != weights_digest([("b", module)])
    with torch.no_grad():
        module[1].bias[1] += 1
    assert weights_digest([("a", module)]) != before


def test_rows_share_a_backbone_and_options_win_over_presets(scorer):
    matchers = scorer_matchers(
        scorer,
        ["paper", "calibrated+shared-query", "diffusion-classifier", "paper"],
        {"timesteps": (500,)},
    )
    assert [matcher.name.partition(" ")[2] for matcher in matchers] == [
        "paper",
        "calibrated+shared-query",
        "diffusion-classifier",
    ]
    assert all(matcher.scorer.backbone is scorer.backbone for matcher in matchers)
    configs = [matcher.scorer.config for matcher in matchers]
    assert [config.mode for config in configs] == ["exact", "shared-query", "exact"]
    assert [config.calibration for config in configs] == [None, "gray", None]
    assert [config.error_term for config in configs] == [None, None, "mse"]
    assert {config.timesteps for config in configs} == {(500,)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("papers", "Did you mean 'paper'"),
        ("paper+fast", "with '\\+shared-query' behind it"),
        ("discffusion+shared-query", "scores by attention alone"),
    ],
)
def test_what_is_no_kind_of_score_is_refused(scorer, spec, message):
    with pytest.raises(ConfigError, match=message):
        scorer_matchers(scorer, [spec], {})


def test_names_are_short(tiny_sd_folder):
    assert short_name(str(tiny_sd_folder)) == tiny_sd_folder.name
    assert short_name("owner/model") == "owner/model"


@pytest.mark.long
def test_trials_differ_by_noise_alone(scorer):
    data = shapes_benchmark("winoground", per_label=1)
    found = evaluate(data, [ScorerMatcher(scorer, name="paper")], trials=2)
    one, other = found.scores["paper"]
    assert not torch.equal(one, other)
    again = evaluate(data, [ScorerMatcher(scorer, name="paper")], trials=1, seed=1)
    torch.testing.assert_close(again.scores["paper"][0], other)
