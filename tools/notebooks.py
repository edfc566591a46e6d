"""Notebooks with outputs, and their pages, made of examples: `make notebooks`.

Each is run from top to bottom in an empty folder. The example stays the source; what is written is
`docs/tutorials/<name>.ipynb`, and the same as a page with pictures. `make notebooks ARGS=depth`
makes one alone. A notebook keeps the digest of its example, which a test compares.
"""

import base64
import hashlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "tutorials"
NAMES = (
    "ask_a_picture",
    "score_image_text",
    "word_tokens",
    "linear_probe",
    "segmentation_head",
    "depth",
    "correspondence",
    "use_with_transformers",
)
_LINKS = (
    "[Download this page as a notebook]({name}.ipynb){{ download }}, or run "
    "`python examples/{source}.py`."
)


def main() -> None:
    sources = sys.argv[1:] or NAMES
    if unknown := set(sources) - set(NAMES):
        sys.exit(f"no notebook is made of {sorted(unknown)}; choose from {', '.join(NAMES)}")
    for source in sources:
        print(source, flush=True)
        build(source)


def build(source: str) -> None:
    """Run an example and write its notebook and its page."""
    import jupytext
    from nbclient import NotebookClient

    name = source.replace("_", "-")
    example = ROOT / "examples" / f"{source}.py"
    notebook = jupytext.read(example)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    _tidy(notebook, example)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    (TARGET / f"{name}.ipynb").write_text(text, encoding="utf-8")
    title, *parts = page_parts(notebook, name)
    heading, _, rest = title.partition("\n")
    whole = [heading, _LINKS.format(name=name, source=source), rest.strip(), *parts]
    text = "\n\n".join(part for part in whole if part) + "\n"
    (TARGET / f"{name}.md").write_text(text, encoding="utf-8")


def page_parts(notebook: Any, name: str) -> list[str]:
    """The cells as Markdown; pictures are written beside the page."""
    pictures = TARGET / f"{name}_files"
    shutil.rmtree(pictures, ignore_errors=True)
    parts: list[str] = []
    count = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        # In braces the language colours the code; tests paste and run the other blocks of pages.
        parts.append(f"``` {{ .python }}\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                count += 1
                pictures.mkdir(exist_ok=True)
                (pictures / f"{count}.png").write_bytes(base64.b64decode(data["image/png"]))
                parts.append(f"![Output {count}]({pictures.name}/{count}.png)")
            else:
                shown = output.get("text") or data["text/plain"]
                parts.append(f"``` {{ .text .output }}\n{shown.rstrip()}\n```")
    return parts


def digest(example: Path) -> str:
    """What a notebook keeps of the example that it was made of."""
    return hashlib.sha256(example.read_bytes()).hexdigest()


def _tidy(notebook: Any, example: Path) -> None:
    """Leave out what differs from run to run, and the second picture of a PIL image."""
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
        "diffenc": {"source": f"examples/{example.name}", "sha256": digest(example)},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data = {"image/png": _smaller(output.data["image/png"])}


def _joined(outputs: list[Any]) -> list[Any]:
    """Printed text in one piece, whenever it arrived."""
    joined: list[Any] = []
    for output in outputs:
        before = joined[-1] if joined else {}
        if output.output_type == "stream" and before.get("name") == output.name:
            before["text"] += output.text
        else:
            joined.append(output)
    return joined


def _smaller(encoded: str) -> str:
    """A picture as PNG in 256 colours where that is smaller: it lies in the repository twice."""
    content = base64.b64decode(encoded)
    with Image.open(io.BytesIO(content)) as picture:
        buffer = io.BytesIO()
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(buffer, format="png", optimize=True)
    best = min(content, buffer.getvalue(), key=len)
    return base64.b64encode(best).decode("ascii")


if __name__ == "__main__":
    main()
