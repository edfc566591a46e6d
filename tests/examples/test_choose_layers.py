"""The example on layer weights, at a tiny setting: a row for all, and weights of sum 1."""

import re
from pathlib import Path

import pytest

from scripts import run_script

EXAMPLE = Path(__file__).parents[2] / "examples" / "choose_layers.py"
ROWS = (
    "every layer alike",
    "layers weighed",
    "shared-query, every layer alike",
    "shared-query, layers weighed",
    "denoising error",
)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_it_weighs_layers_and_compares_on_other_items(tmp_path, monkeypatch):
    options = ("--fit", "1", "--test", "1", "--trials", "1", "--references", "1")
    monkeypatch.setenv("COLUMNS", "120")
    done = run_script(EXAMPLE, *options, "--layers", "up_blocks.1", "up_blocks.0", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in ROWS:
        found = re.search(rf"│ {row}\s+│ +([\d.]+)\s+│ +([\d.]+)\s+│ +([\d.]+)", done.stdout)
        assert found, done.stdout
        text, image, group = map(float, found.groups())
        assert 0 <= group <= min(text, image) <= 100
    for name in ROWS[1], ROWS[3]:
        listed = done.stdout.split(f"{name}: mean weight over trials\n")[1]
        weights = [float(w) for w in re.findall(r"^  ([\d.]+)  up_blocks", listed, re.M)[:4]]
        assert sum(weights) == pytest.approx(1, abs=0.03)
        assert weights == sorted(weights, reverse=True)
