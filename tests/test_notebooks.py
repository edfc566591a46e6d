"""Notebooks with outputs stand beside the pages; the examples that they are made of are run."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


def cells_of(path, kind):
    notebook = json.loads(path.read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source_of(cell):
    return "".join(cell["source"])


def example_of(path):
    return ROOT / "examples" / f"{path.stem.replace('-', '_')}.py"


def test_there_is_a_notebook():
    assert "score-image-text" in [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_code_of_its_example(path):
    blocks = example_of(path).read_text("utf-8").split("# %%")[1:]
    code = [block.strip() for block in blocks if not block.startswith(" [markdown]")]
    assert [source_of(cell).strip() for cell in cells_of(path, "code")] == code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_from_top_to_bottom_without_an_error(path):
    code = cells_of(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [output["output_type"] for cell in code for output in cell["outputs"]]
    assert "error" not in kinds
    assert len([cell for cell in code if "image/png" in json.dumps(cell["outputs"])]) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_no_path_of_the_machine_and_no_warning(path):
    text = json.dumps([cell["outputs"] for cell in cells_of(path, "code")])
    assert not any(word in text for word in ("/tmp", "/home", "Warning", "it/s"))


def test_the_last_cell_finds_the_picture_that_it_looked_for():
    last = cells_of(ROOT / "docs/tutorials/score-image-text.ipynb", "code")[-1]
    printed = "".join(next(o["text"] for o in last["outputs"] if o["output_type"] == "stream"))
    assert "which is right" in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_of_a_notebook_has_its_code_and_its_pictures(path):
    page = path.with_suffix(".md").read_text("utf-8")
    for cell in cells_of(path, "code"):
        assert source_of(cell).strip() in page
    for line in page.splitlines():
        if line.startswith("![png]("):
            assert (path.parent / line.removeprefix("![png](").rstrip(")")).is_file()
