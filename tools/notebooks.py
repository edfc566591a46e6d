"""Notebooks with outputs, and their pages, made of examples: `make notebooks`.

Each is run from top to bottom in an empty folder. The example stays the source; what is written is
`docs/tutorials/<name>.ipynb`, and the same as a page with pictures. `make notebooks ARGS=depth`
makes one alone, and `ARGS="--text depth"` runs nothing: only prose may have changed, and outputs
stay. A notebook keeps the digest of its example, which a test compares.
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
    "finetune_lora",
    "fuse_with_clip",
    "use_with_transformers",
)
_LINKS = (
    "[Download this page as a notebook]({name}.ipynb){{ download }}, or run "
    "`python examples/{source}.py`."
)


def main() -> None:
    only_text = "--text" in sys.argv[1:]
    sources = [name for name in sys.argv[1:] if name != "--text"] or NAMES
    if unknown := set(sources) - set(NAMES):
        sys.exit(f"no notebook is made of {sorted(unknown)}; choose from {', '.join(NAMES)}")
    for source in sources:
        print(source, flush=True)
        build(source, only_text=only_text)


def build(source: str, *, only_text: bool = False) -> None:
    """Run an example, or keep what it gave before, and write its notebook and its page."""
    import jupytext

    name = source.replace("_", "-")
    example = ROOT / "examples" / f"{source}.py"
    notebook = jupytext.read(example)
    if only_text:
        _keep_outputs(notebook, jupytext.read(TARGET / f"{name}.ipynb"))
    else:
        _run(notebook)
    _tidy(notebook, example)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    (TARGET / f"{name}.ipynb").write_text(text, encoding="utf-8")
    title, *parts = page_parts(notebook, name)
    heading, _, rest = title.partition("\n")
    whole = [heading, _LINKS.format(name=name, source=source), rest.strip(), *parts]
    text = "\n\n".join(part for part in whole if part) + "\n"
    (TARGET / f"{name}.md").write_text(text, encoding="utf-8")


def _run(notebook: Any) -> None:
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()


def _keep_outputs(notebook: Any, before: Any) -> None:
    """Take the outputs of the notebook that is there; it must have the same code."""
    new, old = (
        [cell for cell in each.cells if cell.cell_type == "code"] for each in (notebook, before)
    )
    if [cell.source for cell in new] != [cell.source for cell in old]:
        sys.exit("the code has changed too: run it, without --text")
    for cell, same in zip(new, old, strict=True):
        cell.outputs, cell.execution_count = same.outputs, same.execution_count


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
        if picture.mode == "P":
            return encoded
        buffer = io.BytesIO()
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(buffer, format="png", optimize=True)
    best = min(content, buffer.getvalue(), key=len)
    return base64.b64encode(best).decode("ascii")


if __name__ == "__main__":
    main()
