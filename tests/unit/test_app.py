"""What the page of `diffenc app` shows, computed without the page."""

import sys

import pytest
from typer.testing import CliRunner

from diffenc import DiffusionEncoder
from diffenc.app.answers import Desk, main_taps, score_texts
from diffenc.cli.main import app
from diffenc.errors import BackboneError, ConfigError, PromptError, TapError
from diffenc.shapes.example import example_picture
from loaded import shared

PICTURE = example_picture(48)
QUESTION = "where is a red circle?"


@pytest.fixture(scope="module")
def model(tiny_sd_folder):
    return str(tiny_sd_folder)


@pytest.fixture(scope="module")
def answer(model):
    desk = Desk(side=64)
    return desk.answer(PICTURE, QUESTION, ["a blue square", "", "a blue square"], model=model)


def test_a_question_gives_features_differences_words_and_scores(answer):
    titles = [panel.title for panel in answer.features]
    assert titles == ["unconditional", "conditional", "difference", "what the text changed"]
    assert list(answer.words) == ["where", "is", "a", "red", "circle"]
    assert all(panel.image is not None for panel in answer.features)


def test_each_text_is_scored_once_and_the_best_comes_first(answer, model):
    texts = [text for text, _ in answer.scores]
    assert sorted(texts) == sorted({QUESTION, "a blue square"})
    values = [score for _, score in answer.scores]
    assert values == sorted(values, reverse=True)


def test_the_text_that_is_true_of_the_picture_comes_first():
    texts = ["a green triangle above a purple star", "a red circle left of a blue square"]
    (best, first), (other, second) = score_texts(shared("shapes"), example_picture(64), texts)
    assert (best, other) == (texts[1], texts[0])
    assert second < first < 0


def test_what_is_missing_is_asked_for(model):
    desk = Desk()
    with pytest.raises(ConfigError, match="there is no picture: drop one"):
        desk.answer(None, QUESTION, model=model)
    with pytest.raises(PromptError, match="has no word yet"):
        desk.answer(PICTURE, "  ", model=model)
    with pytest.raises(TapError, match="nowhere"):
        desk.answer(PICTURE, QUESTION, model=model, tap="nowhere")
    with pytest.raises(BackboneError, match="unknown model"):
        main_taps("no-such-model")


def test_one_model_is_in_memory_at_a_time(model):
    desk = Desk()
    first = desk.backbone(model)
    assert desk.backbone(model) is first
    desk.backbone("shapes")
    assert desk.backbone(model) is not first


def test_taps_to_choose_from_are_there_and_the_best_place_comes_first():
    taps = main_taps("shapes")
    assert taps[0] == "up_blocks.1"
    assert "mid_block" in taps
    assert len(set(taps)) == len(taps)
    encoder = DiffusionEncoder.from_pretrained("shapes", taps=tuple(taps))
    assert [tap.name for tap in encoder.feature_info] == taps
    assert main_taps("sd3.5-medium")[0] == "transformer_blocks.12"


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if not installed
    result = CliRunner().invoke(app, ["app"])
    assert result.exit_code == 2
    assert "pip install 'diffenc[app]'" in result.output
