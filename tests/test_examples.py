"""Every example and the README's first program run as they stand, on the bundled model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import run_script

ROOT = Path(__file__).parents[1]
# tests/examples runs those with options, at a tiny setting.
EXAMPLES = sorted(
    path
    for path in (ROOT / "examples").glob("*.py")
    if "argparse" not in path.read_text(encoding="utf-8")
)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path):
    done = run_script(path, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.long
def test_the_program_of_the_readme_runs(tmp_path):
    """In a process of its own: the first thing that a user does."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert program is not None
    done = subprocess.run(
        [sys.executable, "-c", program[1]],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 64," in done.stdout
