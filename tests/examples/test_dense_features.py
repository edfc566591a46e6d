"""The examples on dense features, at a tiny setting: they compare with baselines and draw."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import Outcome, run_script

EXAMPLES = Path(__file__).parents[2] / "examples"
RUNS = {
    "segmentation_head": ("--scenes", "24", "--steps", "8"),
    "depth": ("--scenes", "20", "--steps", "20"),
    "correspondence": ("--pairs", "2", "--timesteps", "50", "--taps", "mid_block", "up_blocks.1"),
}
BASELINES = {
    "segmentation_head": ("pixels", "latents", "features", "features + text"),
    "depth": ("chance", "pixels", "latents", "features", "features + caption"),
    "correspondence": ("pixels", "latents", "mid_block", "up_blocks.1"),
}


def run(name: str, *arguments: str, folder: Path) -> Outcome:
    return run_script(EXAMPLES / f"{name}.py", *arguments, folder=folder)


def rows(printed: str) -> dict[str, list[float]]:
    """Numbers behind the first words of every indented line."""
    found = {}
    for line in printed.splitlines():
        if match := re.match(r"  (\S+(?: \S+)*?)((?:\s+\d+(?:\.\d+)?)+)$", line):
            found[match[1]] = [float(number) for number in match[2].split() if "." in number]
    return found


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RUNS)
def test_it_prints_its_baselines_and_writes_the_picture(name, tmp_path):
    done = run(name, *RUNS[name], "--output", "drawn.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert set(BASELINES[name]) <= set(found), done.stdout
    assert all(0 <= number <= 1 for numbers in found.values() for number in numbers)
    assert "wrote drawn.png" in done.stdout.splitlines()
    with Image.open(tmp_path / "drawn.png") as picture:
        assert min(picture.size) > 400
        assert np.asarray(picture.convert("L")).std() > 10


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_backbone_is_one_option_away(tiny_sd_folder, tmp_path):
    """The tiny model is random: this shows that nothing in an example is tied to `shapes`."""
    arguments = ("--backbone", str(tiny_sd_folder), "--pairs", "1", "--timesteps", "50")
    done = run("correspondence", *arguments, "--taps", "up_blocks.1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "up_blocks.1" in rows(done.stdout)
    assert (tmp_path / "correspondence.png").exists()


def test_an_unknown_backbone_is_named(tmp_path):
    done = run("depth", "--backbone", "no-such-model", folder=tmp_path)
    assert done.returncode != 0
    assert "unknown model" in done.stderr
