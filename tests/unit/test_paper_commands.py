"""Each row of the paper has commands that parse, plan, and run in miniature."""

import json
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from diffenc.cli.main import app
from diffenc.errors import ConfigError
from diffenc.evals.paper import published_table, published_tables
from diffenc.evals.paper_commands import commands_page, row_commands
from diffenc.mllm.recipes import recipe, recipes

ROWS = {
    f"{table}-{number}": row
    for table in published_tables()
    for number, row in enumerate(row_commands(table), start=1)
}
QUICK = "mmvp-vlm-1"
DROPPED = ("--dtype", "--judge-model")
REPLACED = {
    "--clip": ["shapes-clip"],
    "--model": ["shapes"],
    "--judge": ["words"],
    "--trials": ["1"],
    "--metric": ["rouge-l", "--tokenizer", "simple"],
}


def in_miniature(words, scored):
    """The same command on coloured shapes: few items, bundled models, no Java and no service."""
    made, position = [], 0
    while position < len(words):
        word = words[position]
        position += 2 if word in DROPPED or word in REPLACED else 1
        if word in REPLACED:
            made += [word, *REPLACED[word]]
        elif word == "--data":
            made += [word, "shapes", *(["--per-label", "1"] if scored else ["--limit", "3"])]
            position += 1
        elif word not in DROPPED:
            made.append(word)
    return made


class Miniature:
    """Runs commands in a folder, each once, trainings on eight scenes."""

    def __init__(self, folder):
        self.folder, self.known = folder, {}
        self.run("shapes-data shapes-llava --scenes 8 --turns 1")
        self.run("recipes --shapes --write recipes")
        for path in (folder / "recipes").iterdir():
            text = path.read_text().replace("epochs = 4", "epochs = 1").replace(" = 32", " = 8")
            path.write_text(text.replace("[data]", "[data]\ncheck_images = false"))
        said = {"0": "a red circle", "1": "a blue square", "2": "a star"}
        (folder / "pseudo.json").write_text(json.dumps(said))

    def run(self, line):
        if line not in self.known:
            words = shlex.split(line)
            scored = words[1] in ("mmvp-vlm", "winoground", "timesteps")
            self.known[line] = CliRunner().invoke(app, in_miniature(words, scored))
        result = self.known[line]
        assert result.exit_code == 0, f"{line}\n{result.output}"
        return result


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield Miniature(folder)


program_command = cache(lambda: typer.main.get_command(app))


def parsed(line):
    """The options of a command line, as the program reads them."""
    program, *words = shlex.split(line)
    assert program == "diffenc"
    command = program_command()
    with command.make_context("diffenc", list(words), resilient_parsing=True) as context:
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        options = command.make_context(command.name, words, parent=context).params
    # Older typer makes paths of them only for the function itself.
    kinds = {each.name: type(getattr(each, "type", None)).__name__ for each in command.params}
    paths = {name for name, kind in kinds.items() if "Path" in kind}
    return {
        name: Path(value) if name in paths and isinstance(value, str) else value
        for name, value in options.items()
    }


def test_every_row_of_every_table_has_commands():
    for table in published_tables():
        labels = [row.label for row in published_table(table).rows]
        assert [row.label for row in row_commands(table)] == labels
    assert all(row.commands for row in ROWS.values())
    assert len(ROWS) >= 11 + 11 + 11 + 13 + 6 + 4 + 12 + 7 + 11 + 4 + 7
    with pytest.raises(ConfigError, match="there is no table 'vqaa'"):
        row_commands("vqaa")


@pytest.mark.parametrize("name", ROWS)
def test_a_rows_commands_parse_and_ask_what_was_trained(name):
    row = ROWS[name]
    trained, written = set(), {"pseudo.json"}
    for training in row.trainings:
        start = recipe(training).start
        assert not start or start in trained
        trained.add(training)
    for line in row.commands:
        options = parsed(line)
        model = options["model"]
        if isinstance(model, Path):
            assert model.parent == Path("runs")
            assert model.name in trained
        else:
            assert model == "shapes" or line.count("--preset paper") == 1
        if options.get("captions") is not None:
            assert str(options["captions"]) in written
        written.add(str(options["output"]))


def test_answers_of_different_settings_have_files_of_their_own():
    lines = {line for row in ROWS.values() for line in row.commands if " -o " in line}
    files = [line.split(" -o ")[1] for line in lines]
    assert len(set(files)) == len(files)


def test_every_recipe_is_of_a_row():
    of_rows = {training for row in ROWS.values() for training in row.trainings}
    assert of_rows == set(recipes())


def test_settings_are_those_of_the_rows():
    captions = [row.commands[-1] for row in row_commands("captions")]
    published = published_table("captions").rows
    for line, row in zip(captions, published, strict=True):
        _, trained, prompt = row.labels
        assert ("--prompts caption" in line) == (
            "GT" in prompt or ("CFG=1" in prompt and "FT)" in row.label)
        )
        assert ("--captions" in line) == ("LLaVA cap" in prompt or "Pseudo" in prompt)
        assert ("nocap" in line) == (trained == "No captions")
        assert ("drop" in line) == ("dropped" in trained)
        scale = prompt.partition("CFG=")[2]
        assert (f"--guidance-scale {scale} " in line) == bool(scale)
    for row in row_commands("vqa"):
        dagger = "+caption" in row.label
        assert all(("--captions" in line) == dagger for line in row.commands[-2:])
        assert any("evaluate blink" in line for line in row.commands) != dagger
        assert ("lora" in row.trainings[-1]) == ("SDXL-FT" in row.label)
        assert row.trainings[-1].endswith("-c") == ("-c" in row.label)
    for row in row_commands("guidance"):
        scale = row.label.split(",")[0].removesuffix(".0")
        assert row.trainings[-1] == f"sdxl-align-gt-s{scale}"
    for table in ("later-features", "later-fusion", "blink", "leakage", "later-leakage"):
        runs = [row.trainings[-1] for row in row_commands(table)]
        assert len(set(runs)) == len(runs)
    ways = {"concatenation": "concat", "cross-attention": "cross"}
    for row in row_commands("later-fusion"):
        how, scale = row.label.split(", ")[1:]
        assert row.trainings[-1] == f"{ways[how]}-instruct-s{scale.removeprefix('s = ')}"


def test_the_page_is_made_of_the_data():
    page = Path(__file__).parents[2] / "docs/results/paper-commands.md"
    assert page.read_text(encoding="utf-8") == commands_page()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "name", [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ROWS]
)
def test_a_row_runs_in_miniature(miniature, name):
    pytest.importorskip("pycocoevalcap")
    for line in ROWS[name].lines:
        result = miniature.run(line.removeprefix("diffenc "))
        if "evaluate" in line:
            assert "shapes" in result.output
