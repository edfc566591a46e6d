import json
import math

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffenc.cli.main import app
from diffenc.config import EncoderConfig
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, TapError
from diffenc.models import load_backbone
from diffenc.shapes.captions import noun_phrase
from diffenc.shapes.render import render
from diffenc.shapes.scenes import COLORS, SHAPES
from diffenc.studies.leakage_readout import _gather, sample_prompts, study_leakage_readout
from diffenc.studies.leakage_readout_page import findings_of
from diffenc.studies.trials import sample_trials

TAPS = ("conv_in", "mid_block")


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder):
    return load_backbone(str(tiny_sd_folder))


@pytest.fixture(scope="module")
def study(backbone):
    return study_leakage_readout(
        backbone, taps=TAPS, timesteps=(261, 50), guidance_scales=(7, 1.5), scenes=30, seeds=2
    )


@pytest.mark.long
def test_every_part_is_read_everywhere(study):
    assert (study.taps, study.timesteps, study.guidance_scales) == (TAPS, (50, 261), (1.5, 7))
    assert len(study.readings) == 2 * 2 * 2 * (3 + 2)
    assert all(len(each.accuracy.values) == 2 for each in study.readings)
    assert all(0 <= value <= 1 for each in study.readings for value in each.accuracy.values)
    rows = study.rows("color")
    assert [row[:2] for row in rows] == [(tap, t) for tap in TAPS for t in ("50", "261")]
    assert {len(row) for row in rows} == {len(study.columns())} == {8}
    json.dumps(study.to_dict(), allow_nan=False)


@pytest.mark.long
def test_in_front_of_the_text_there_is_nothing_to_read(study):
    for each in study.loudness:
        assert (each.ratio.mean > 1e-4) == (each.tap != "conv_in")
    uncond = [e.accuracy for e in study.readings if (e.tap, e.part) == ("conv_in", "uncond")]
    cond = [e.accuracy for e in study.readings if (e.tap, e.part) == ("conv_in", "cond")]
    assert uncond == cond


def test_prompts_know_nothing_of_scenes():
    named = sample_prompts(3000, seed=1)
    assert named == sample_prompts(3000, seed=1) != sample_prompts(3000, seed=2)
    things = [trial.thing for trial in sample_trials(3000, seed=1)]
    same = sum(color == thing.color for (color, _), thing in zip(named, things, strict=True))
    assert abs(same / 3000 - 1 / len(COLORS)) < 0.03
    for shape in SHAPES:
        assert abs(sum(s == shape for _, s in named) / 3000 - 1 / len(SHAPES)) < 0.04


def test_means_and_loudness_are_those_of_the_maps(backbone):
    trials, named = sample_trials(3, seed=0), sample_prompts(3, seed=0)
    config = EncoderConfig(taps=("mid_block",), timestep=(50,), batch_size=2)
    several = DiffusionEncoder(backbone, config)
    vectors, ratios = _gather(several, trials, named, lambda count: None)
    encoder = DiffusionEncoder(backbone, EncoderConfig(taps=("mid_block",), timestep=50))
    change, size = [], []
    for row, (trial, (color, shape)) in enumerate(zip(trials, named, strict=True)):
        image = render(trial.scene, backbone.default_size)
        prompt = noun_phrase(shape=shape, color=color)
        cond = encoder.extract([image], [prompt], conditioning="cond")["mid_block"][0]
        uncond = encoder.extract([image], None, conditioning="uncond")["mid_block"][0]
        for part, maps in enumerate((uncond, cond)):
            expected = maps.flatten(1).mean(dim=1)
            got = vectors["mid_block", 50][part][row]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        change.append((cond - uncond).pow(2).sum(dim=0).sqrt().mean())
        size.append(uncond.pow(2).sum(dim=0).sqrt().mean())
    expected = float(torch.stack(change).mean() / torch.stack(size).mean())
    assert ratios["mid_block", 50] == pytest.approx(expected, rel=1e-3)


@pytest.mark.long
def test_the_bundled_model_hides_the_prompt_in_the_difference():
    study = study_leakage_readout(
        taps=["mid_block", "up_blocks.1"],
        timesteps=[50],
        guidance_scales=[20],
        scenes=60,
        seeds=1,
    )
    chance = study.chance["color"]
    assert study.find("color", "uncond", "mid_block", 50).mean < chance + 0.2
    for tap in study.taps:
        assert study.find("color", "difference", tap, 50).mean > chance + 0.2
    plain = study.find("color", "cond", "up_blocks.1", 50).mean
    assert study.find("color", "cfg", "up_blocks.1", 50, 20.0).mean > plain


@pytest.mark.parametrize(
    "wrong",
    [
        {"scenes": 29},
        {"seeds": 0},
        {"timesteps": []},
        {"timesteps": [50, 50]},
        {"guidance_scales": [math.inf]},
        {"guidance_scales": [2, 2]},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_wrong_numbers(backbone, wrong):
    with pytest.raises(ConfigError):
        study_leakage_readout(backbone, **wrong)


def test_unknown_places(backbone, study):
    with pytest.raises(TapError):
        study_leakage_readout(backbone, taps=["up_blocks.9"])
    with pytest.raises(ConfigError, match="nothing was read at"):
        study.find("color", "cfg", "mid_block", 50, 3.0)


@pytest.mark.long
def test_the_command_writes_a_page_with_verdicts_and_a_picture(tiny_sd_folder, tmp_path):
    options = ["--taps", "mid_block,up_blocks.1", "--timesteps", "50", "--scales", "1.5,7"]
    options += ["--scenes", "30", "--seeds", "2", "-b", str(tiny_sd_folder), "-o", str(tmp_path)]
    result = CliRunner().invoke(app, ["study", "leakage-readout", *options])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "leakage-readout.md").read_text("utf-8")
    for words in ("color of the prompt", "cfg 1.5", "The prompt leaks", "must exceed"):
        assert words in page
    with Image.open(tmp_path / "leakage-readout.png") as picture:
        assert min(picture.size) > 300


def test_findings_rest_on_taps_that_the_text_reaches(study):
    decided = findings_of(study)
    sides: dict[str, object] = {}
    for decision in (each for finding in decided for each in finding.decisions):
        sides |= decision.sides
    expected = study.find("color", "cond", "mid_block", 50).percent
    assert sides["mean/cond/color"] == expected  # conv_in lies in front of the text
    assert sides["mean/chance/color"].mean == pytest.approx(100 * study.chance["color"])
    assert sides["mean/cfg-7/shape"] == study.find("shape", "cfg", "mid_block", 50, 7.0).percent
