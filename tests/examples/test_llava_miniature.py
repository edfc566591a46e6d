"""The miniature of LLaVA at a tiny setting, and the syntax of the real recipe's scripts."""

import re
import subprocess
from pathlib import Path

import pytest

from diffenc.hosts.spec import TowerSpec
from scripts import run_script

FOLDER = Path(__file__).parents[2] / "examples" / "llava"


@pytest.mark.long
@pytest.mark.parametrize(
    ("prompt", "tower"),
    [("question", "diffenc:shapes?grid=2&rank=2"), ("empty", "diffenc:shapes?grid=2")],
    ids=["question, adapter", "empty, frozen"],
)
def test_the_miniature_trains_and_is_asked(prompt, tower, tmp_path) -> None:
    options = ["--prompt", prompt, "--tower", tower, "--scenes", "24", "--steps", "2"]
    done = run_script(FOLDER / "miniature.py", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"prompt={prompt}, tower={tower}" in done.stdout
    found = re.search(r"held-out accuracy ([\d.]+) of (\d+)", done.stdout)
    assert found is not None
    assert 0 <= float(found[1]) <= 1
    assert int(found[2]) >= 10


def test_towers_of_the_scripts_parse_and_the_scripts_too() -> None:
    scripts = sorted(FOLDER.glob("*.sh"))
    assert len(scripts) == 3
    for script in scripts:
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    for path in (*scripts, FOLDER / "README.md"):
        names = re.findall(r"diffenc:[\w?=&.-]+", path.read_text(encoding="utf-8"))
        assert names
        for name in names:
            assert TowerSpec.parse(name).num_patches > 0
