import json
import re

import pytest
from PIL import Image
from typer.testing import CliRunner

from diffenc.cli.main import app
from diffenc.cli.progress import progress_bar
from diffenc.evals.matching import matchers as matchers_module
from evals_data import mmvp_vlm, read_lines, winoground_jsonl

FAST = ("--timesteps", "100,700", "--device", "cpu")
MINI = ("--data", "shapes", "--per-label", 1, *FAST)


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], prog_name="diffenc")


@pytest.fixture
def model(tiny_sd_folder):
    return ("--model", tiny_sd_folder)


@pytest.fixture
def calls(monkeypatch):
    """Counts scored items."""
    counted = []
    original = matchers_module.ScorerMatcher.__call__

    def count(self, images, texts, *, seed):
        counted.append((self.name, seed))
        return original(self, images, texts, seed=seed)

    monkeypatch.setattr(matchers_module.ScorerMatcher, "__call__", count)
    return counted


@pytest.mark.long
def test_several_scores_in_one_run(model, tiny_sd_folder, tmp_path, calls):
    result = run(
        *("winoground", *MINI, *model, "--trials", 2, "-o", tmp_path / "out"),
        *("--preset", "paper", "--preset", "calibrated+shared-query"),
    )
    assert result.exit_code == 0, result.output
    name = tiny_sd_folder.name
    assert re.search(rf"^  {name} paper +\S+ ± \S+ +\S+ ± ", result.stdout, re.MULTILINE)
    assert "winoground, 5 items, percent" in result.stdout
    assert "they say nothing of photographs" in result.stdout
    content = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert list(content["models"]) == [f"{name} paper", f"{name} calibrated+shared-query"]
    described = content["models"][f"{name} paper"]["description"]
    assert described["config"]["timesteps"] == [100, 700]
    page = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    command = "diffenc evaluate winoground --data shapes --per-label 1 --model "
    assert command in page
    assert "--preset paper --preset calibrated+shared-query --trials 2" in page
    assert len(calls) == 2 * 5 * 2


@pytest.mark.long
def test_a_repeated_run_scores_nothing_and_more_trials_only_what_is_missing(model, tmp_path, calls):
    arguments = ("winoground", *MINI, *model, "-o", tmp_path)
    first = run(*arguments, "--trials", 1)
    assert len(calls) == 5
    again = run(*arguments, "--trials", 1)
    assert len(calls) == 5
    assert "5 of 5 scores were there already" in again.stdout
    assert first.stdout.splitlines()[:4] == again.stdout.splitlines()[:4]
    run(*arguments, "--trials", 2)
    assert len(calls) == 10
    assert run(*arguments, "--trials", 1, "--force").exit_code == 0
    assert len(calls) == 15


@pytest.mark.long
def test_an_interrupted_run_says_how_it_goes_on(model, tmp_path, monkeypatch, calls):
    counting = matchers_module.ScorerMatcher.__call__

    def stop(self, images, texts, *, seed):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counting(self, images, texts, seed=seed)

    arguments = ("mmvp-vlm", *MINI, *model, "--trials", 1, "-o", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(matchers_module.ScorerMatcher, "__call__", stop)
        result = run(*arguments)
    assert result.exit_code == 130
    assert f"what was scored is in {tmp_path / 'scores.jsonl'}" in result.output
    assert not (tmp_path / "report.md").exists()
    assert run(*arguments).exit_code == 0
    assert len(calls) == 6
    assert sum(line["type"] == "score" for line in read_lines(tmp_path / "scores.jsonl")) == 6


@pytest.mark.long
def test_another_configuration_in_the_same_folder_is_refused(model, tmp_path):
    arguments = ("winoground", *MINI, *model, "--trials", 1, "-o", tmp_path)
    assert run(*arguments).exit_code == 0
    result = run(*arguments, "--layers", "mid_block")
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert 'config.layers is ["mid_block"], was ["up_blocks' in result.output
    assert "--force" in result.output


@pytest.mark.long
def test_real_data_is_read_and_the_paper_stands_beside_it(model, tmp_path):
    data = winoground_jsonl(tmp_path / "winoground")
    result = run(
        *("winoground", "--data", data, *model, *FAST, "--trials", 1, "-o", tmp_path / "o")
    )
    assert result.exit_code == 0, result.output
    assert "paper: SD-v2.1-base 512" in result.stdout
    assert "note: 3 items where winoground has 400" in result.output
    without = run(
        *("winoground", "--data", data, *model, *FAST, "--trials", 1, "-o", tmp_path / "o"),
        "--no-paper",
    )
    assert "paper:" not in without.stdout


@pytest.mark.long
def test_broken_data_is_told_in_one_line_and_skipped_on_request(model, tmp_path, calls):
    data = mmvp_vlm(tmp_path / "data")
    (data / "MLLM_VLM Images/Presence/3.jpg").write_bytes(b"")
    arguments = ("mmvp-vlm", "--data", data, *model, *FAST, "--trials", 1, "-o", tmp_path / "o")
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "1 unreadable pictures (id 3-4: MLLM_VLM Images/Presence/3.jpg" in result.output
    assert calls == []
    skipped = run(*arguments, "--skip-broken", "--limit", 4)
    assert skipped.exit_code == 0, skipped.output
    assert len(calls) == 3
    assert "1 problems, left out: 1 unreadable" in skipped.output
    again = run(*arguments, "--skip-broken", "--limit", 4, "--template", "{}, seen")
    assert 'template is "{}, seen", was "a photo of {}"' in again.output


@pytest.mark.long
def test_calibration_by_pictures_of_the_data(model, tmp_path):
    arguments = ("winoground", *MINI, *model, "--trials", 1, "-o", tmp_path / "o")
    result = run(*arguments, "--data-references", 3)
    assert result.exit_code == 0, result.output
    line = read_lines(tmp_path / "o/scores.jsonl")[1]
    assert line["description"]["config"]["calibration"] == "given"
    assert line["description"]["config"]["reference_digest"].startswith("3-")
    refused = run(*arguments, "--data-references", 3, "--preset", "paper", "--force")
    assert refused.exit_code == 2
    assert "go with a preset that calibrates" in refused.output


@pytest.mark.long
def test_json_is_printed_alone(model, tmp_path):
    result = run("mmvp-vlm", *MINI, *model, "--trials", 1, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["benchmark"] == "mmvp-vlm"


@pytest.mark.long
def test_the_timestep_study_writes_table_and_picture(model, tmp_path, calls):
    pytest.importorskip("matplotlib")
    result = run(
        *("timesteps", "mmvp-vlm", "--data", "shapes", "--per-label", 1, *model, "--trials", 2),
        *("--timesteps", "89,189,989", "--ensemble", "189,989", "-o", tmp_path / "study"),
    )
    assert result.exit_code == 0, result.output
    assert len(calls) == 12
    content = json.loads((tmp_path / "study/timesteps.json").read_text())
    assert list(content["overall"]) == ["89", "189", "989", "ensemble"]
    page = (tmp_path / "study/timesteps.md").read_text(encoding="utf-8")
    assert "![timesteps](timesteps.png)" in page
    assert "diffenc evaluate timesteps mmvp-vlm --data shapes" in page
    with Image.open(tmp_path / "study/timesteps.png") as image:
        assert image.width > 1000
    assert re.search(r"^ +ensemble +\S+ ± ", result.stdout, re.MULTILINE)


@pytest.mark.long
def test_the_draw_study_writes_table_and_picture(model, tmp_path, calls):
    pytest.importorskip("matplotlib")
    result = run(
        *("draws", "winoground", *MINI, *model, "--noises", 6, "-o", tmp_path / "study"),
    )
    assert result.exit_code == 0, result.output
    assert len(calls) == 30
    content = json.loads((tmp_path / "study/draws.json").read_text())
    assert [row["count"] for row in content["rows"]] == [1, 2]
    assert (tmp_path / "study/draws.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["winoground", "--data", "nowhere"], "there is no 'nowhere' here"),
        (["mmvp-vlm", "--data", "MMVP/MMVP_VLM"], "hf download MMVP/MMVP_VLM"),
        (["winoground", *MINI, "--preset", "papers"], "Did you mean 'paper'"),
        (["winoground", *MINI, "--preset", "none"], "nothing to score with"),
        (["winoground", *MINI, "--timesteps", ""], "timesteps must be like"),
        (["winoground", *MINI, "--timesteps", "1000"], "timesteps must be ints in [0, 1000)"),
        (["winoground", *MINI, "--template", "a photo"], "must hold {}"),
        (["winoground", *MINI, "--clip", "no-such-clip"], "cannot load a CLIP from"),
        (["winoground", "--data", ".", "--per-label", 2], "belongs to --data shapes"),
        (["timesteps", "blink", "--data", "shapes"], "benchmark must be one of"),
        (["timesteps", "winoground", *MINI, "--ensemble", "5"], "the ensemble must be some of"),
        (["timesteps", "winoground", *MINI, "--ensemble", "100,100"], "each once, not (100, 100)"),
        (["timesteps", "winoground", *MINI, "--ensemble", "x"], "ensemble must be like 50"),
        (["draws", "winoground", *MINI, "--noises", 5], "--noises"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, *model)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("winoground", *MINI, "--model", "no/such", "-o", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot make the folder" in result.output


def test_the_bar_begins_with_what_is_there(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress_bar("scoring", unit="items") as update:
        update(40, 50)
        update(45, 50)
    assert "45/50" in capsys.readouterr().err
