import json
import re

import pytest
from typer.testing import CliRunner

from diffenc.cli.main import app
from diffenc.cli.progress import progress_bar
from diffenc.mllm import DiffusionVLM
from diffenc.mllm.training import read_log, write_miniature
from train_builders import Parts, config
from vlm_builders import picture, save_tiny_lm, save_tiny_vision


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return Parts(
        vision=save_tiny_vision(folder / "vision"),
        language_model=save_tiny_lm(folder / "lm"),
        data=write_miniature(folder / "data", scenes=8),
    )


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_a_config_is_planned_trained_and_resumed(parts, tmp_path):
    path = tmp_path / "run.toml"
    config(parts, tmp_path / "out").write(path)
    planned = run("train", path, "--plan", "--processes", "2", "--tflops", "1")
    assert planned.exit_code == 0, planned.output
    for words in ("samples", "8, 0 without a picture", "steps", "2, 1 batches", "in all", "GB"):
        assert words in planned.stdout
    assert not (tmp_path / "out").exists()
    done = run("train", path, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "4 steps, mean loss" in done.stdout
    assert len(read_log(tmp_path / "out")) == 4
    vlm = DiffusionVLM.from_pretrained(tmp_path / "out" / "model")
    assert len(vlm.generate(picture(0), "hi", max_new_tokens=2)) == 1
    again = run("train", path, "--device", "cpu")
    assert again.exit_code == 2
    assert "--resume" in again.output
    assert "nothing to resume" in run("train", path, "--resume").output


def test_a_transformers_that_is_too_old_to_train_is_refused(tmp_path, monkeypatch):
    data = dict.fromkeys(("align", "images"), tmp_path)
    path = tmp_path / "run.toml"
    config(Parts(vision=tmp_path, language_model=tmp_path, data=data), tmp_path / "out").write(path)
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    result = run("train", path, "--device", "cpu")
    assert result.exit_code == 2
    assert "training needs transformers 5.0 or newer, and 4.57.6 is installed" in result.output


def test_errors_are_one_line(parts, tmp_path):
    missing = run("train", tmp_path / "none.toml")
    assert missing.exit_code == 2
    assert missing.output.startswith(f"error: there is no file {tmp_path / 'none.toml'}")
    assert "diffenc recipes --shapes" in missing.output
    records = json.loads(parts.data["align"].read_text())
    records[0]["image"] = "gone.png"
    (tmp_path / "broken.json").write_text(json.dumps(records))
    path = tmp_path / "run.toml"
    config(parts, tmp_path / "out", annotations=str(tmp_path / "broken.json")).write(path)
    for options in ((), ("--plan",)):
        result = run("train", path, *options)
        assert result.exit_code == 2
        assert "1 of 8 samples cannot be used: 1 with missing images (gone.png)" in result.output
    assert not (tmp_path / "out").exists()
    assert "are for --plan" in run("train", path, "--tflops", "1").output


def test_the_miniature_is_written(tmp_path):
    result = run("shapes-data", tmp_path / "new", "--scenes", "3", "--turns", "1")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "new" / "images").iterdir())) == 3
    records = json.loads((tmp_path / "new" / "instruct.json").read_text())
    assert [len(record["conversations"]) for record in records] == [6, 6, 6]  # two are lettered
    options = ("--scenes", "3", "--turns", "1", "--lettered", "0")
    assert run("shapes-data", tmp_path / "words", *options).exit_code == 0
    records = json.loads((tmp_path / "words" / "instruct.json").read_text())
    assert [len(record["conversations"]) for record in records] == [2, 2, 2]


def test_the_bar_counts_pictures_then_steps_and_tells_the_loss(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    titles = ("looking at pictures", "training")
    with progress_bar(*titles, unit=("pictures", "steps")) as show:
        show(4, 4)
        show(1, 9, "training, loss 0.512")
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", capsys.readouterr().err)
    assert "4/4 pictures" in shown
    assert "training, loss 0.512" in shown
    assert "1/9 steps" in shown
