"""The example with transformers, at a tiny setting."""

import re
from pathlib import Path

import pytest

from scripts import run_script

EXAMPLE = Path(__file__).parents[2] / "examples" / "use_with_transformers.py"


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [[], ["--no-prompts"]], ids=["prompts", "none"])
def test_it_learns_saves_loads_and_answers(options, tmp_path):
    done = run_script(EXAMPLE, "--steps", "4", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^step +\d+ loss (\S+)$", done.stdout, re.M)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    share = re.search(r"^right: (\d\.\d\d) of 64 new questions$", done.stdout, re.M)
    assert share is not None
    assert 0 <= float(share[1]) <= 1
    assert "(it is " in done.stdout.splitlines()[-1]
