"""LLaVA's own classes, `train()` and `load_pretrained_model` on diffenc's tower.

Skipped unless DIFFENC_LLAVA_CHECKOUT names a checkout of LLaVA, the folder that holds `llava/`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = os.environ.get("DIFFENC_LLAVA_CHECKOUT", "")
RUN = Path(__file__).parents[1] / "llava_run.py"

pytestmark = [
    pytest.mark.skipif(not CHECKOUT, reason="DIFFENC_LLAVA_CHECKOUT names no checkout of LLaVA"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("llava")
    done = subprocess.run(
        [sys.executable, str(RUN), CHECKOUT, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    answers: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps(answers, indent=1))  # noqa: T201  # the figures of the run, with pytest -s
    return answers


def test_stage_one_trains_the_projector_and_saves_it_alone(found) -> None:
    assert found["stage 1 losses"][-1] < found["stage 1 losses"][0]
    assert all(key.startswith("model.mm_projector.") for key in found["stage 1 saved"])


@pytest.mark.parametrize("name", ["lora", "full"])
def test_stage_two_trains_the_adapter_and_loading_brings_it_back(found, name) -> None:
    assert found[f"{name} losses"][-1] < found[f"{name} losses"][0]
    assert found[f"llava-{name} adapter moved"] > 1e-3
    assert found[f"llava-{name} reloaded"]
    assert found[f"llava-{name} side file"]
    assert found[f"llava-{name} side file equal"]


def test_adapter_weights_are_among_those_that_lora_leaves_beside(found) -> None:
    assert found["lora saved adapter"] == 72  # 9 attentions, 4 projections, down and up


@pytest.mark.parametrize("name", ["llava-lora", "llava-full"])
def test_the_question_arrives_in_every_kind_of_call(found, name) -> None:
    answers = found[name]
    assert answers["same question"] == answers["scope"] == 0.0
    assert answers["other question"] > 1e-3
    assert answers["mixed batch"] < 1e-4
    assert answers["tiles"] < 1e-4
    assert answers["beams 1 repeat"]
    assert answers["beams 3 repeat"]


def test_other_towers_are_still_built_by_llava(found) -> None:
    assert "nobody/knows" in found["other towers"]


@pytest.mark.parametrize("name", ["llava-lora", "llava-full"])
def test_the_plug_in_for_lmms_eval_answers_with_the_question_in_the_tower(found, name) -> None:
    answers = found[f"{name} answers"]
    assert answers["prompts"]
    assert answers["scale"] == 3
    assert answers["batch"] == answers["alone"]
    assert all(answers["batch"])
    assert answers["evaluate"] == answers["alone"][:1]


@pytest.mark.parametrize("name", ["pretrain", "finetune", "finetune_lora"])
def test_the_example_scripts_run_as_they_are_written(found, name) -> None:
    written = found["examples"][name]
    assert {"checkpoint-2", "diffenc_adapter.safetensors"} <= set(written)
    weights = {"pretrain": "mm_projector.bin", "finetune": "model.safetensors"}
    assert weights.get(name, "non_lora_trainables.bin") in written
