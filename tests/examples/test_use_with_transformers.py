"""The example with transformers, at a tiny setting."""

import re
from pathlib import Path

import pytest

from scripts import run_script

EXAMPLE = Path(__file__).parents[2] / "examples" / "use_with_transformers.py"


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "options",
    [[], ["--no-prompts"], ["--spec", "diffenc:shapes?rank=4"]],
    ids=["prompts", "none", "cells"],
)
def test_it_learns_saves_loads_and_answers(options, tmp_path):
    done = run_script(EXAMPLE, "--steps", "4", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^step +\d+ loss (\S+)$", done.stdout, re.M)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    share = re.search(r"^right: (\d\.\d\d) of 256 new questions$", done.stdout, re.M)
    rows = re.findall(r"^  scenes of (\d): (\d\.\d\d) of (\d+)$", done.stdout, re.M)
    assert share is not None
    assert [count for count, _, _ in rows] == ["1", "2", "3"]
    weighted = sum(float(part) * int(number) for _, part, number in rows) / 256
    assert float(share[1]) == pytest.approx(weighted, abs=0.01)
    assert "(it is " in done.stdout.splitlines()[-1]
