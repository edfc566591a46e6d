"""Forks of LLaVA on a tower of diffenc, by the lines of the guide "A recipe for each fork".

Skipped unless DIFFENC_HOSTS names a folder of checkouts; forks that are not in it are left out, and
those whose own code does not import here are skipped with the reason.
"""

import os
from pathlib import Path
from typing import Any

import pytest

import forks_run
from fork_recipes import FORKS, Fork

HOSTS = Path(os.environ.get("DIFFENC_HOSTS", "no folder of checkouts"))

pytestmark = [
    pytest.mark.skipif(not HOSTS.is_dir(), reason="DIFFENC_HOSTS names no folder of checkouts"),
    pytest.mark.timeout(600),
]


def run(fork: Fork, what: str) -> dict[str, Any]:
    checkout = HOSTS / fork.folder
    if not checkout.is_dir():
        pytest.skip(f"no checkout {checkout}")
    report = forks_run.run(fork.called, checkout, what)
    if "stopped" in report and "imported" not in report:
        pytest.skip(report["stopped"])
    assert "stopped" not in report, report.get("trace")
    return report


@pytest.mark.parametrize("fork", FORKS, ids=lambda fork: fork.called)
def test_a_model_of_the_fork_reads_the_question_trains_and_comes_back(fork) -> None:
    report = run(fork, "ask")
    assert report["last loss"] < report["first loss"]
    assert report["adapter moved"] > 1e-3
    assert report["same question"] == 0
    assert report["other question"] > 1e-4
    assert report["batch against singles"] < 1e-5
    if fork.generates:
        assert report["answers repeat"]
    if fork.loads:
        assert report["adapter after loading"] < 1e-4
        assert report["logits after loading"] < 1e-2  # a loader's half precision


@pytest.mark.parametrize(
    "fork", [fork for fork in FORKS if fork.training is not None], ids=lambda fork: fork.called
)
def test_the_training_script_of_the_fork_trains_the_adapter_and_saves_it(fork) -> None:
    report = run(fork, "train")
    assert report["losses"][-1] < report["losses"][0]
    assert report["adapter moved"] > 1e-3
    assert report["adapter after loading"] == 0
