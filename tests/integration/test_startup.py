"""What a process imports up to its first features: nothing beside what the model itself needs."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
bare = set(sys.modules)
from PIL import Image
from diffenc import DiffusionEncoder
encoder = DiffusionEncoder.from_pretrained("shapes")
encoder(Image.new("RGB", (64, 48), "red"), "a red circle")
print(json.dumps(sorted(set(sys.modules) - bare)))
"""
LIBRARIES = ("diffusers.schedulers.scheduling_ddpm", "einops", "jaxtyping", "numpy", "PIL")
"""The scheduler adds the noise, and shapes are written with the next two; nothing heavy is new."""

ROOMS = {"cli", "evals", "fusion", "hosts", "mllm", "scorer", "scoring", "shapes", "studies", "viz"}
"""Parts of diffenc that features need nowhere."""


@pytest.fixture(scope="module")
def added():
    """Names of the modules that the first features import on top of the bare imports."""
    call = [sys.executable, "-c", SCRIPT]
    return json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


@pytest.mark.long
def test_the_first_features_import_a_scheduler_and_small_libraries_alone(added):
    foreign = [
        name
        for name in added
        if name.partition(".")[0] not in {"diffenc", *sys.stdlib_module_names}
        and not any(f"{name}.".startswith(f"{library}.") for library in LIBRARIES)
    ]
    assert foreign == []


@pytest.mark.long
def test_the_first_features_leave_the_other_parts_of_diffenc_alone(added):
    rooms = {name.split(".")[1] for name in added if name.startswith("diffenc.")}
    assert rooms & ROOMS == set()
