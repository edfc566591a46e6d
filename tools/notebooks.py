"""Notebooks with outputs, and their pages, made of examples: `make notebooks`.

Each is run from top to bottom in an empty folder. The example stays the source; what is written is
`docs/tutorials/<name>.ipynb`, and the same as a page with pictures.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "tutorials"
NAMES = ("score_image_text",)
_BACK = (
    "\n[This page as a notebook]({name}.ipynb), made of "
    "`examples/{source}.py` with `make notebooks`.\n"
)


def main() -> None:
    for source in NAMES:
        build(source)


def build(source: str) -> None:
    """Run an example and write its notebook and its page."""
    import jupytext
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter

    name = source.replace("_", "-")
    notebook = jupytext.read(ROOT / "examples" / f"{source}.py")
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, resources={"metadata": {"path": folder}}).execute()
    _tidy(notebook)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    (TARGET / f"{name}.ipynb").write_text(text, encoding="utf-8")
    resources = {"output_files_dir": f"{name}_files", "unique_key": name}
    page, made = MarkdownExporter().from_notebook_node(notebook, resources)
    for file, content in made["outputs"].items():
        path = TARGET / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    lines = [line.rstrip() for line in page.strip().splitlines()]
    back = _BACK.format(name=name, source=source)
    (TARGET / f"{name}.md").write_text("\n".join(lines) + "\n" + back, encoding="utf-8")


def _tidy(notebook: Any) -> None:
    """Leave out times of runs, this machine's kernel, and the second picture of a PIL image."""
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data = {"image/png": output.data["image/png"]}


if __name__ == "__main__":
    main()
