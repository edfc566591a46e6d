import pytest

from diffenc.errors import ConfigError
from diffenc.scoring.config import (
    SCORE_TIMESTEPS,
    ScorerConfig,
    classifier_timesteps,
    discffusion_timesteps,
    itm_timesteps,
    scorer_preset,
    scorer_presets,
)
from marks import wrong_type


def test_the_published_timesteps_come_from_the_grid():
    assert discffusion_timesteps(5) == SCORE_TIMESTEPS == (189, 389, 589, 789, 989)
    assert discffusion_timesteps(10) == tuple(range(89, 1000, 100))
    assert discffusion_timesteps(30)[:3] == (32, 65, 98)
    assert (len(discffusion_timesteps(30)), len(discffusion_timesteps(50))) == (30, 49)
    assert classifier_timesteps(5, of=20) == (125, 325, 525, 725, 925)
    assert classifier_timesteps(20)[:2] == (25, 75)
    assert classifier_timesteps(1000) == tuple(range(1000))
    assert itm_timesteps(10) == tuple(range(10, 911, 100))
    assert (itm_timesteps(1), itm_timesteps(2), len(itm_timesteps(250))) == ((10,), (10, 510), 245)


@pytest.mark.parametrize("count", [0, 1001])
def test_a_grid_has_1_to_1000_steps(count):
    for grid in (discffusion_timesteps, classifier_timesteps, itm_timesteps):
        with pytest.raises(ConfigError, match=r"in \[1, 1000\]"):
            grid(count)
    with pytest.raises(ConfigError, match="a grid of 4 timesteps has no 5"):
        classifier_timesteps(5, of=4)


@pytest.mark.parametrize("name", scorer_presets())
def test_dictionaries_and_back(name):
    config = ScorerConfig.from_dict(scorer_preset(name))
    assert ScorerConfig.from_dict(config.to_dict()) == config
    weighted = ScorerConfig(layers=("mid_block",), layer_weights=(2.0,), reference_texts=("a",))
    assert ScorerConfig.from_dict(weighted.to_dict()) == weighted


def test_steps_are_every_draw_of_every_timestep():
    assert ScorerConfig(timesteps=(3, 900), draws=2).steps == ((3, 0), (3, 1), (900, 0), (900, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": ()}, "one scheduler step or more"),
        ({"timesteps": (1000,)}, r"\[0, 1000\), got 1000"),
        ({"timesteps": (-1,)}, "got -1"),
        ({"timesteps": (5, 5)}, "hold one twice"),
        ({"timesteps": (True,)}, "ints"),
        ({"draws": 0}, "draws must be an int of 1 or more"),
        ({"batch_size": 0}, "batch_size must be an int of 1 or more"),
        wrong_type({"seed": 0.5}, "seed must be an int"),
        ({"layers": "every"}, "layers must be one of"),
        ({"layers": ()}, "at least one entry"),
        ({"layer_weights": (0.0, 0.0)}, "not all 0"),
        ({"layer_weights": (1.0, -1.0)}, "0 or above"),
        ({"layer_weights": (float("nan"),)}, "finite"),
        ({"lse_lambda": 0.0}, "above 0"),
        wrong_type({"space": "logit"}, "Did you mean 'logits'"),
        wrong_type({"lse_axis": "token"}, "Did you mean 'tokens'"),
        wrong_type({"token_mask": "nopad"}, "Did you mean 'no_pad'"),
        wrong_type({"head_reduce": "sum"}, "head_reduce must be one of"),
        wrong_type({"error_term": "l2"}, "error_term must be one of"),
        wrong_type({"calibration": "grey"}, "Did you mean 'gray'"),
        wrong_type({"mode": "fast"}, "mode must be one of"),
        ({"attention": False}, "nothing to score by"),
        ({"mode": "shared-query", "error_term": "mse"}, "scores by attention alone"),
        ({"include_uncond": True, "token_mask": "content"}, "leaves nothing"),
        ({"attention": False, "error_term": "mse", "include_uncond": True}, "which is off"),
        ({"size": 0}, "size must be a positive int"),
    ],
)
def test_what_is_not_allowed_says_so(options, message):
    with pytest.raises(ConfigError, match=message):
        ScorerConfig(**options)


def test_unknown_options_and_presets_offer_near_ones():
    with pytest.raises(ConfigError, match="Did you mean 'lse_lambda'"):
        ScorerConfig.from_dict({"lse_lamda": 1.0})
    with pytest.raises(ConfigError, match="Did you mean 'calibrated'"):
        scorer_preset("calibrate")
