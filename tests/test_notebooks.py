"""Notebooks are committed without outputs, and every cell runs on the bundled model."""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


def show(value):
    """What a notebook does with the last expression of a cell."""
    draw = getattr(value, "_repr_png_", None)
    return draw() if draw is not None else repr(value)


def run_cell(source, namespace):
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), namespace)
    if last is None:
        return None
    return show(eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs(path):
    notebook = json.loads(path.read_text("utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text("utf-8"))
    namespace = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = [run_cell("".join(cell["source"]), namespace) for cell in cells]
    pictures = [value for value in shown if isinstance(value, bytes)]
    assert len(pictures) >= 3
    assert all(value.startswith(b"\x89PNG") for value in pictures)


def test_there_is_a_notebook():
    assert "score_image_text" in [path.stem for path in NOTEBOOKS]
