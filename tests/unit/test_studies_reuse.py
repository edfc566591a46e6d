"""The study of `reuse`: exact features drift nowhere, others as far as hand-made sums say."""

import json

import pytest
from torch.nn import functional as F

from diffenc import DiffusionEncoder
from diffenc.config import EncoderConfig
from diffenc.errors import ConfigError
from diffenc.shapes.render import render
from diffenc.studies.reuse import study_reuse
from diffenc.studies.reuse_page import to_markdown
from diffenc.studies.trials import sample_trials
from loaded import shared

TAPS = ("up_blocks.1.attentions.0", "up_blocks.1")
OPTIONS = {"taps": TAPS, "timesteps": (50,), "scenes": 6, "seeds": 1, "size": 32}


@pytest.fixture(scope="module")
def study(tiny_sd_folder):
    return study_reuse(shared(tiny_sd_folder), **OPTIONS)


@pytest.mark.long
def test_drift_and_direction_are_those_of_the_features(study, tiny_sd_folder):
    trials = sample_trials(6, seed=0)
    images, captions = [render(t.scene, 32) for t in trials], [t.caption() for t in trials]
    options = {"taps": TAPS, "timestep": 50, "size": 32}

    def features(conditioning, part=None):
        config = EncoderConfig(**options, reuse=part)
        encoder = DiffusionEncoder(shared(tiny_sd_folder), config)
        prompts = None if conditioning == "uncond" else captions
        return encoder.extract(images, prompts, conditioning=conditioning)

    plain, true = features("uncond"), features("cond")
    for row in study.rows:
        other = features("cond", row.part)[row.tap]
        exact = true[row.tap].flatten(1)
        drift = ((other.flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)).mean()
        changes = [(maps - plain[row.tap]).flatten(1) for maps in (other, true[row.tap])]
        assert row.drift["caption"].mean == pytest.approx(float(drift), rel=1e-4)
        cosine = float(F.cosine_similarity(*changes).mean())
        assert row.direction["caption"].mean == pytest.approx(cosine, rel=1e-4)


@pytest.mark.long
def test_every_part_tap_and_timestep_has_its_row_and_a_page_shows_them(study):
    assert [(row.part, row.tap) for row in study.rows] == [
        (part, tap) for part in ("down", "middle") for tap in TAPS
    ]
    assert 0 < study.words["down"].mean <= 1
    text = to_markdown(study, command="diffenc study reuse", made_with="")
    assert text.count("| up_blocks") == 4 or text.count("| 50 |") == 4
    json.dumps(study.to_dict(), allow_nan=False)


def test_taps_before_the_decoder_are_refused(tiny_sd_folder):
    with pytest.raises(ConfigError, match=r"no text reaches 'down_blocks\.1'"):
        study_reuse(shared(tiny_sd_folder), **{**OPTIONS, "taps": ("down_blocks.1",)})
