import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from diffenc.cli.main import app
from diffenc.storage.reading import tomllib
from diffenc.studies.vlm import STUDIES, read_plan
from diffenc.studies.vlm.plan_file import bundled_text
from diffenc.studies.vlm.workshop import Workshop
from train_builders import trains
from vlm_builders import save_tiny_lm

PLAN = """
title = "My own study"
about = "Whether it runs."
paper = ["guidance"]
plots = ["captions/named"]

[data]
scenes = 8

[model]
encoder = "SD"
language_model = "LM"
template = "chat"
options = { conditioning = "cfg", grid = 2 }

[align]
batch_size = 4
device_batch_size = 4
precision = "fp32"
gradient_checkpointing = false

[train.only]
stage = "align"
prompts = "caption(first)"

[train.clip]
label = "on CLIP"
stage = "align"
model = { kind = "vision", encoder = "no/such-clip" }

[measure.oracle]
kind = "captions"
prompts = "oracle"
items = 3

[[finding]]
statement = "It says something."
paper = "Nowhere."
holds_if = ["only/oracle/named > 0"]
if_not = "It was hardly trained."
"""


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("parts") / "lm")


@pytest.fixture
def config(tiny_sd_folder, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(PLAN.replace('"SD"', f'"{tiny_sd_folder}"'), encoding="utf-8")
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["study", *map(str, arguments)])


@trains
@pytest.mark.long
def test_a_study_is_run_printed_and_written(config, language_model, tmp_path):
    options = ("--config", config, "--language-model", language_model, "--seeds", 2)
    options = (*options, "--work", tmp_path / "work")
    folder = tmp_path / "new" / "folder"
    result = run("guidance", "-o", folder, *options)
    assert result.exit_code == 0, result.output
    assert "not run: clip" in result.stdout
    assert "2 trainings, 0 of them done before" in result.stdout
    names = {"guidance.md", "guidance.json", "guidance.png"}
    assert {path.name for path in folder.iterdir()} == names
    page = (folder / "guidance.md").read_text("utf-8")
    assert page.startswith("# My own study")
    assert f"diffenc study guidance --output {folder} --config {config}" in page
    assert "Table 5" in page
    told = json.loads((folder / "guidance.json").read_text("utf-8"))
    assert told["plan"]["seeds"] == 2
    with Image.open(folder / "guidance.png") as picture:
        assert min(picture.size) > 300
    again = run("guidance", "-o", folder, *options)
    assert again.exit_code == 2
    assert again.output.startswith("error: the output exists already")
    forced = run("guidance", "-o", folder, "--force", *options)
    assert "2 trainings, 2 of them done before" in forced.stdout


@trains
@pytest.mark.long
def test_a_study_without_plots_writes_no_picture(config, language_model, tmp_path):
    config.write_text(config.read_text("utf-8").replace('plots = ["captions/named"]', ""), "utf-8")
    options = ("--config", config, "--language-model", language_model, "--seeds", 1)
    result = run("guidance", "-o", tmp_path / "out", *options, "--work", tmp_path / "work")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"guidance.md", "guidance.json"}


def test_plan_tells_and_trains_nothing(config, language_model, tmp_path):
    options = ("--config", config, "--language-model", language_model, "--work", tmp_path / "work")
    result = run("guidance", "--plan", "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    for words in ("trainings", "6 steps", "9 answers", "minutes", "not run: clip", "0 trainings"):
        assert words in result.stdout, words
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "work").exists()


def test_a_plan_counts_what_another_run_left_and_adds_nothing(config, language_model, tmp_path):
    study = read_plan("guidance", config).with_options(language_model=str(language_model))
    workshop = Workshop(study, tmp_path / "work")
    model = workshop.folder_of(next(iter(study.trainings)), 0) / "model"
    model.mkdir(parents=True)
    (model / "vlm.json").write_text("{}")
    there = sorted((tmp_path / "work").rglob("*"))
    options = ("--config", config, "--language-model", language_model, "--work", tmp_path / "work")
    result = run("guidance", "--plan", *options)
    assert "1 trainings are there already" in result.stdout
    assert sorted((tmp_path / "work").rglob("*")) == there


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_a_command_that_tells_what_it_does(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    for words in ("--plan", "--work", "interrupted study goes on", "--config", "--seeds"):
        assert words in " ".join(result.stdout.split())


def test_the_file_of_a_study_can_be_written_and_edited(tmp_path):
    path = tmp_path / "mine.toml"
    result = run("leakage", "--write-config", path)
    assert result.exit_code == 0, result.output
    assert path.read_text("utf-8") == bundled_text("leakage")
    assert tomllib.loads(path.read_text("utf-8"))["train"]["cfg4"]["stage"] == "align"
    path.write_text("mine")
    again = run("leakage", "--write-config", path)
    assert again.output.startswith("error: the output exists already")
    assert path.read_text() == "mine"


def one_line_error(result, words):
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ")
    assert len(result.output.strip().splitlines()) == 1
    assert words in result.output


def test_errors_are_one_line(config, language_model, tmp_path):
    work = ("--work", tmp_path / "work", "-o", tmp_path / "out")
    one_line_error(run("guidence"), "No such command")
    one_line_error(run("guidance", "--config", tmp_path / "none.toml", *work), "cannot read")
    model = ("--language-model", "no/such-lm")
    one_line_error(run("guidance", "--config", config, *model, *work), "no/such-lm")
    one_line_error(run("guidance", "--config", config, "--seeds", "0", *work), "--seeds")
    config.write_text(config.read_text("utf-8").replace("[align]", "[aline]"), "utf-8")
    one_line_error(run("guidance", "--config", config, *work), "Did you mean 'align'")


def test_folders_that_cannot_be_written_are_refused(config, language_model, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    options = ("--config", config, "--language-model", language_model)
    one_line_error(run("guidance", *options, "-o", file / "out"), "cannot make the folder")
    one_line_error(
        run("guidance", *options, "-o", tmp_path / "out", "--work", file / "work"),
        "cannot make the folder",
    )


def test_existing_files_are_refused_before_anything_is_trained(config, tmp_path):
    (tmp_path / "guidance.md").write_text("mine")
    options = ("--config", config, "--language-model", "no/such-lm", "--work", tmp_path / "work")
    result = run("guidance", *options, "-o", tmp_path)
    one_line_error(result, "the output exists already")
    assert (tmp_path / "guidance.md").read_text() == "mine"
