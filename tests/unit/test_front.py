"""What the first pages say of measurements is what the files of results hold."""

import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from diffenc.studies.vlm import STUDIES
from diffenc.studies.vlm.measurements import Measurement
from diffenc.studies.vlm.plan import StudyData
from diffenc.studies.vlm.plan_file import bundled_plan

OF_THE_PAPER = tuple(study for study in STUDIES if study != "tokens")
ROOT = Path(__file__).parents[2]
SENTENCE = re.compile(
    r"(\w+) \[studies\]\S* repeat (\d+) findings [^:]*: (\d+) hold, (\d+) come out the other way "
    r"round,(?: and)? (\d+) show no clear difference(?:, and (\d+) could not be measured)?\."
)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_findings_are_those_of_the_studies(page):
    verdicts = Counter(
        finding["verdict"]
        for study in OF_THE_PAPER
        for finding in json.loads((ROOT / f"docs/results/{study}.json").read_text())["findings"]
    )
    text = (ROOT / page).read_text(encoding="utf-8")
    studies, *numbers = SENTENCE.search(" ".join(text.split())).groups()
    assert studies == {8: "Eight"}[len(OF_THE_PAPER)]
    kinds = ("holds", "opposite", "does not show", "not measured")
    assert [int(n or 0) for n in numbers] == [verdicts.total(), *(verdicts[kind] for kind in kinds)]


@pytest.mark.parametrize("study", STUDIES)
def test_the_page_of_a_study_is_of_the_plan_that_its_command_runs(study):
    kept = json.loads((ROOT / f"docs/results/{study}.json").read_text())["plan"]
    # options that came later are as usual in what was measured before them
    kept["data"] = asdict(StudyData()) | kept["data"]
    for name, each in kept["measurements"].items():
        usual = asdict(Measurement(name=name, kind=each["kind"]))
        kept["measurements"][name] = usual | each
    plan = bundled_plan(study).with_options(seeds=kept["seeds"]).to_dict()
    assert kept == json.loads(json.dumps(plan))


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_paper_is_named_with_its_address(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "https://arxiv.org/abs/2507.07106" in text
    assert "Agarwal" in text
