"""The same code at real size: a Stable Diffusion 2.1 folder with random weights (`-m slow`)."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffenc import DiffusionEncoder

pytestmark = pytest.mark.slow


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively; elsewhere it is far slower."""
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = Path(__file__).parents[2] / "benchmarks" / "real_size.py"
    spec = importlib.util.spec_from_file_location("real_size", path)
    real_size = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real_size)
    target = tmp_path_factory.mktemp("real") / "sd2.1-base"
    return real_size.build_folder("sd2.1-base", target, dtype=fast_dtype())


@pytest.mark.timeout(1200)
def test_sd21_at_512_pixels(folder):
    encoder = DiffusionEncoder.from_pretrained(folder, taps=("up_blocks.1",), dtype=fast_dtype())
    assert sum(p.numel() for p in encoder.backbone.unet.parameters()) == 865_910_724
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    features = encoder.extract(Image.fromarray(pixels), "a red circle", conditioning="cfg")
    assert features["up_blocks.1"].shape == (1, 1280, 32, 32)
    assert features["up_blocks.1"].dtype == fast_dtype()
    assert torch.isfinite(features["up_blocks.1"]).all()
    assert not torch.equal(
        features.select("cond")["up_blocks.1"], features.select("uncond")["up_blocks.1"]
    )


@pytest.mark.timeout(1200)
def test_sd21_in_bfloat16(folder):
    """At 64 pixels, so that it ends in time where the processor has to emulate bfloat16."""
    options = {"taps": ("up_blocks.1",), "size": 64, "truncate": True}
    exact = DiffusionEncoder.from_pretrained(folder, **options)
    half = DiffusionEncoder.from_pretrained(folder, dtype=torch.bfloat16, **options)
    image = Image.new("RGB", (80, 60), (200, 30, 30))
    expected = exact.extract(image, "a red circle", conditioning="cfg")["up_blocks.1"]
    found = half.extract(image, "a red circle", conditioning="cfg")["up_blocks.1"]
    assert found.dtype == torch.bfloat16
    assert found.shape == (1, 1280, 4, 4)
    assert (found.float() - expected).abs().max() <= 0.05 * expected.abs().max()
