"""Every example and the README's first program run as they stand, on the bundled model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# tests/examples runs those with options, at a tiny setting.
EXAMPLES = sorted(
    path
    for path in (ROOT / "examples").glob("*.py")
    if "argparse" not in path.read_text(encoding="utf-8")
)


def run(*arguments: str, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path):
    assert run(str(path), folder=tmp_path)


def test_the_program_of_the_readme_runs(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert program is not None
    assert "torch.Size([1, 64," in run("-c", program[1], folder=tmp_path)
