"""Notebooks with outputs stand beside the pages; the examples that they are made of are run."""

import hashlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
PICTURES = {
    "ask-a-picture": 2,
    "correspondence": 1,
    "depth": 1,
    "finetune-lora": 0,
    "fuse-with-clip": 0,
    "linear-probe": 1,
    "score-image-text": 4,
    "segmentation-head": 1,
    "use-with-transformers": 1,
    "word-tokens": 1,
}
"""The notebooks that there are, and how many pictures each shows."""


def cells_of(path, kind):
    notebook = json.loads(path.read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source_of(cell):
    return "".join(cell["source"])


def example_of(path):
    return ROOT / "examples" / f"{path.stem.replace('-', '_')}.py"


def printed_by(cell):
    return "".join(o["text"] for o in cell["outputs"] if o["output_type"] == "stream")


def all_printed(name):
    return "".join(map(printed_by, cells_of(ROOT / f"docs/tutorials/{name}.ipynb", "code")))


def last_printed(name):
    """What the last cell that prints anything prints: there a notebook finds what it looked for."""
    cells = cells_of(ROOT / f"docs/tutorials/{name}.ipynb", "code")
    return next(filter(None, map(printed_by, reversed(cells))))


def numbers(text):
    return [float(number) for number in re.findall(r"(?<![\w.])[-+]?\d+\.\d+", text)]


def test_the_notebooks_are_there():
    assert {path.stem for path in NOTEBOOKS} == set(PICTURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_made_of_its_example_as_it_is_today(path):
    made_of = json.loads(path.read_text("utf-8"))["metadata"]["diffenc"]
    assert made_of["source"] == f"examples/{example_of(path).name}"
    today = hashlib.sha256(example_of(path).read_bytes()).hexdigest()
    assert made_of["sha256"] == today, f"make notebooks ARGS={example_of(path).stem}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_code_of_its_example(path):
    blocks = example_of(path).read_text("utf-8").split("# %%")[1:]
    code = [block.strip() for block in blocks if not block.startswith(" [markdown]")]
    assert [source_of(cell).strip() for cell in cells_of(path, "code")] == code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_from_top_to_bottom_without_an_error(path):
    code = cells_of(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert "error" not in [output["output_type"] for output in outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == PICTURES[path.stem]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_no_path_of_the_machine_and_no_warning(path):
    text = json.dumps([cell["outputs"] for cell in cells_of(path, "code")])
    assert not any(word in text for word in ("/tmp", "/home", "Warning", "it/s", "stderr"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_repository_small(path):
    assert path.stat().st_size < 150_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_of_a_notebook_has_its_code_and_its_pictures(path):
    page = path.with_suffix(".md").read_text("utf-8")
    for cell in cells_of(path, "code"):
        assert source_of(cell).strip() in page
        assert printed_by(cell).strip() in page
    pictures = re.findall(r"!\[Output \d+\]\((.*?)\)", page)
    assert len(pictures) == PICTURES[path.stem]
    folder = path.with_name(f"{path.stem}_files")
    files = set(folder.iterdir()) if pictures else set()
    assert {path.parent / name for name in pictures} == files
    assert folder.exists() == bool(pictures)
    assert f"]({path.name})" in page


def test_each_question_about_a_picture_looks_at_its_object():
    lines = last_printed("ask-a-picture").splitlines()
    assert len(lines) == 3
    for line in lines:
        seen_x, seen_y, true_x, true_y = numbers(line)
        assert (seen_x - true_x) ** 2 + (seen_y - true_y) ** 2 < 0.1**2
        assert line.endswith("inside")


def test_the_search_finds_the_picture_that_it_looked_for():
    assert "which is right" in last_printed("score-image-text")


def test_the_token_of_a_noun_says_the_color_and_its_place_is_the_object():
    rows = dict(re.findall(r"^  (.*?) +(\d\.\d+)$", all_printed("word-tokens"), re.M))
    assert float(rows["token of the noun"]) > 2 * float(rows["mean of all cells"])
    for line in last_printed("word-tokens").splitlines()[1:]:
        seen_row, seen_column, row, column = numbers(line)
        assert abs(seen_row - row) + abs(seen_column - column) < 0.15


def test_the_probe_finds_stars_and_no_text_helps_it_as_the_page_says():
    rows = re.findall(
        r"^  (?:no text|a star|a circle.*?) +(\d\.\d+)$", all_printed("linear-probe"), re.M
    )
    assert len(rows) == 3
    assert min(map(float, rows)) > 0.7
    assert max(map(abs, numbers(last_printed("linear-probe")))) < 0.03


def test_both_encoders_together_are_as_good_as_the_better_one_everywhere():
    clip, diffusion, both, *of_three = numbers(last_printed("fuse-with-clip"))
    assert min(clip, both) > 0.95 > diffusion
    clip, diffusion, both = of_three
    assert both > diffusion > clip + 0.2


def test_lora_is_beside_its_control_and_both_are_far_above_the_guess():
    rows = dict(re.findall(r"^  (\S.*?\S) +(\d\.\d{3})$", all_printed("finetune-lora"), re.M))
    control, tuned = float(rows["frozen encoder, head trained on"]), float(rows["LoRA and head"])
    assert control > 3 * float(rows["most common answer"])
    assert 0 < tuned - control < 0.1


def test_four_tokens_of_words_name_the_color_also_among_three_objects():
    text = all_printed("use-with-transformers")
    rows = dict(re.findall(r"^  scenes of (\d): (\d\.\d+)", text, re.M))
    assert min(map(float, rows.values())) > 0.8
    guess = float(re.search(r"^the most common answer alone: (.*)$", text, re.M)[1])
    assert guess < 0.25


@pytest.mark.parametrize("name", ["segmentation-head", "depth", "correspondence"])
def test_features_are_better_than_what_they_are_made_of(name):
    features, latents, *_ = numbers(last_printed(name))
    assert features > latents + 0.1
