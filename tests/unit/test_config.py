import subprocess
import sys

import pytest

from diffenc.config import EncoderConfig
from diffenc.errors import ConfigError
from marks import wrong_type


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep": 1000}, r"\[0, 1000\), got 1000"),
        ({"timestep": -1}, "got -1"),
        wrong_type({"timestep": 0.5}, "must be an int"),
        ({"timestep": True}, "must be an int"),
        ({"timestep": (50, 1000)}, "got 1000"),
        ({"timestep": ()}, "got none"),
        ({"draws": 0}, "draws must be an int of 1 or more"),
        wrong_type({"noise": "fresh"}, "'shared' or None"),
        ({"noise": None, "draws": 2}, "one draw"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"guidance_scale": float("nan")}, "finite"),
        wrong_type({"taps": "mid_block"}, "tuple of module paths"),
        ({"taps": ()}, "at least one"),
        ({"taps": ("mid_block", "mid_block")}, "twice, and it is read once"),
        ({"size": 0}, "size must be a positive int"),
        wrong_type({"size": (64, 64, 64)}, "size must be"),
        ({"grid": -2}, "grid must be"),
        wrong_type({"resize": "sqaush"}, "Did you mean 'squash'"),
        wrong_type({"conditioning": "both"}, r"\['uncond', 'cond', 'cfg', 'concat'\]"),
        wrong_type({"posterior": "mean"}, "posterior must be one of"),
        wrong_type({"uncond": "none"}, "uncond must be one of"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_with_what_is_allowed(options, message):
    with pytest.raises(ConfigError, match=message):
        EncoderConfig(**options)


def test_a_config_survives_json_types():
    config = EncoderConfig(taps=("mid_block", "up_blocks.1"), size=(64, 32), guidance_scale=4.5)
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in config.to_dict().items()}
    assert EncoderConfig.from_dict(values) == config


def test_an_unknown_option_is_refused_with_a_near_match():
    with pytest.raises(ConfigError, match="Did you mean 'timestep'"):
        EncoderConfig.from_dict({"timesteps": 3})


def test_the_config_imports_no_torch():
    code = (
        "import sys, types; package = types.ModuleType('diffenc');"
        "package.__path__ = [sys.argv[1]]; sys.modules['diffenc'] = package;"
        "import diffenc.config; assert 'torch' not in sys.modules"
    )
    import diffenc

    subprocess.run([sys.executable, "-c", code, diffenc.__path__[0]], check=True)
