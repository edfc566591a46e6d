"""The example on LoRA, at a tiny setting: it compares with what it started from, and saves."""

import re
from pathlib import Path

import pytest

from diffenc import DiffusionEncoder
from scripts import run_script

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_lora.py"
TINY = ("--train", "24", "--test", "12", "--head-steps", "10", "--steps", "2", "--rank", "2")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_it_prints_accuracy_before_and_after_and_saves_the_encoder(tmp_path):
    done = run_script(EXAMPLE, *TINY, "--output", "tuned", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^  (\S.*\S) +(\d\.\d{3})$", done.stdout, flags=re.MULTILINE))
    assert list(found) == [
        "most common answer",
        "frozen encoder, head",
        "frozen encoder, head trained on",
        "LoRA and head",
        "the same head without LoRA",
    ]
    assert all(0 <= float(accuracy) <= 1 for accuracy in found.values())
    assert re.search(r"LoRA 'default' \(active\) +13,824 +13,824  float32", done.stdout)
    assert done.stdout.splitlines()[-1] == "wrote tuned; read again, features differ by 0"
    again = DiffusionEncoder.from_pretrained(tmp_path / "tuned")
    assert again.active_lora == "default"
    changed = [p for name, p in again.named_parameters() if "lora_B" in name]
    assert all(parameter.any() for parameter in changed)
