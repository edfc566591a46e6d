import json
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from diffenc.cli.main import app

SMALL = ("--scenes", "30", "--focus-scenes", "2", "--seeds", "1", "--timesteps", "50")


def run(*arguments):
    return CliRunner().invoke(app, ["study", "features", *map(str, arguments)])


@pytest.mark.long
def test_tables_are_printed_and_three_files_are_written(tiny_sd_folder, tmp_path):
    folder = tmp_path / "new" / "folder"
    result = run("-b", tiny_sd_folder, "-o", folder, "--taps", "conv_in,up_blocks.1", *SMALL)
    assert result.exit_code == 0, result.output
    for words in ("color", "shape", "position", "count", "pixels", "where a text acts", "wrote"):
        assert words in result.stdout
    assert {path.name for path in folder.iterdir()} == {
        "features.md",
        "features.json",
        "features.png",
    }
    page = (folder / "features.md").read_text("utf-8")
    assert f"diffenc study features --output {folder} --backbone {tiny_sd_folder}" in page
    assert "--timesteps 50 --scenes 30" in page
    found = json.loads((folder / "features.json").read_text("utf-8"))
    assert found["taps"] == ["conv_in", "up_blocks.1"]
    assert {reading["conditioning"] for reading in found["readings"]} == {
        None,
        "uncond",
        "question",
        "caption",
    }
    with Image.open(folder / "features.png") as picture:
        assert min(picture.size) > 300


def test_the_model_may_be_given_as_everywhere_else(tiny_sd_folder, tmp_path):
    options = ("--taps", "mid_block", "--texts", "uncond", *SMALL, "--focus-scenes", "0")
    result = run("--model", tiny_sd_folder, "-o", tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "where a text acts" not in result.stdout
    assert "question" not in result.stdout


def test_existing_files_are_refused_before_the_model_is_looked_at(tmp_path):
    (tmp_path / "features.json").write_text("mine")
    result = run("-b", tmp_path / "no-model", "-o", tmp_path)
    assert result.exit_code == 2
    assert result.output.startswith("error: the output exists already")
    assert (tmp_path / "features.json").read_text() == "mine"
    result = run("-b", tmp_path / "no-model", "-o", tmp_path, "--force")
    assert result.output.startswith("error: unknown model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--timesteps", "fifty"), "timesteps must be like"),
        pytest.param(("--texts", "uncond,answer"), "must be one of", marks=pytest.mark.wrong_type),
        (("--scenes", "3"), "scenes must be an int of 30 or more"),
        (("--taps", "mid_blok"), "no tap matches 'mid_blok'"),
    ],
)
def test_bad_options_are_one_line(options, message, tmp_path):
    result = run("-o", tmp_path, *options)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    result = run("-o", tmp_path / "taken")
    assert result.exit_code == 2
    assert "cannot make the folder" in result.output


def test_without_matplotlib_the_extra_is_named_before_the_model_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("-b", tmp_path / "no-model", "-o", tmp_path)
    assert result.exit_code == 2
    assert "pip install 'diffenc[viz]'" in result.output
