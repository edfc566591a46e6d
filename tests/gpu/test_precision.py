"""Features on a GPU are those of a CPU, up to the rounding of each dtype."""

import pytest
import torch

from diffenc import DiffusionEncoder

pytestmark = pytest.mark.gpu

FOLDERS = ["tiny_sd_folder", "tiny_sd21_folder", "tiny_sdxl_folder"]
TAPS = ("mid_block", "up_blocks.1", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q")
OPTIONS = {"taps": TAPS, "size": (64, 80), "conditioning": "cfg"}
PROMPTS = ["a red circle", "a blue square left of a red circle", "a photo"]
# Rounding of one operation is 1e-3 in float16 and 8e-3 in bfloat16; some hundred follow each other.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@pytest.fixture(params=FOLDERS)
def folder(request):
    return request.getfixturevalue(request.param)


def assert_near(found, expected, tolerance):
    """Relative to each tap's largest magnitude."""
    assert list(found) == list(expected)
    for tap, features in expected.items():
        limit = tolerance * float(features.abs().max())
        torch.testing.assert_close(found[tap].cpu().float(), features, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype_agrees_with_float32_on_a_cpu(folder, pictures, device, dtype):
    expected = DiffusionEncoder.from_pretrained(folder, **OPTIONS).extract(pictures, PROMPTS)
    encoder = DiffusionEncoder.from_pretrained(folder, device=device, dtype=dtype, **OPTIONS)
    features = encoder.extract(pictures.to(device), PROMPTS)
    assert features["mid_block"].device.type == device.type
    assert features["mid_block"].dtype == dtype
    assert_near(features, expected, TOLERANCE[dtype])
    assert_near(features.select("uncond"), expected.select("uncond"), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("part", ["down", "middle"])
def test_every_dtype_agrees_where_the_first_half_runs_without_the_text(
    folder, pictures, device, dtype, part
):
    options = {**OPTIONS, "taps": TAPS[1:], "reuse": part}
    expected = DiffusionEncoder.from_pretrained(folder, **options).extract(pictures, PROMPTS)
    encoder = DiffusionEncoder.from_pretrained(folder, device=device, dtype=dtype, **options)
    for _ in range(2):  # computed, then remembered
        features = encoder.extract(pictures.to(device), PROMPTS)
        assert_near(features, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_picture_has_the_same_features_in_every_batch(folder, pictures, device, dtype):
    encoder = DiffusionEncoder.from_pretrained(
        folder, device=device, dtype=dtype, use_cache=False, **OPTIONS
    )
    together = encoder.extract(pictures, PROMPTS)
    alone = encoder.extract(pictures[1], PROMPTS[1])
    expected = {tap: features[1:2].cpu().float() for tap, features in together.items()}
    assert_near(alone, expected, TOLERANCE[dtype])


def test_what_is_remembered_is_what_was_computed(folder, pictures, device):
    encoder = DiffusionEncoder.from_pretrained(
        folder, device=device, dtype=torch.float16, **OPTIONS
    )
    first = encoder.extract(pictures, PROMPTS).select("uncond")
    again = encoder.extract(pictures, "another question").select("uncond")
    assert encoder.backbone.caches.features.hits == len(pictures)
    for tap in first:
        assert torch.equal(first[tap], again[tap])
        assert first[tap].data_ptr() != again[tap].data_ptr()


def test_the_vae_of_sdxl_stays_in_float32_where_float16_overflows(
    tiny_sdxl_folder, pictures, device
):
    encoder = DiffusionEncoder.from_pretrained(
        tiny_sdxl_folder, device=device, dtype=torch.float16, taps=("latents", "mid_block"), size=64
    )
    features = encoder.extract(pictures, "a red circle")
    assert encoder.backbone.vae.dtype == torch.float32
    assert encoder.backbone.unet.dtype == torch.float16
    assert all(torch.isfinite(each).all() for each in features.values())


def test_moving_an_encoder_forgets_and_agrees(tiny_sd_folder, pictures, device):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, **OPTIONS)
    expected = encoder.extract(pictures, PROMPTS)
    encoder.to(device)
    assert len(encoder.backbone.caches.latents) == 0
    found = encoder.extract(pictures, PROMPTS)
    assert found["mid_block"].device.type == device.type
    assert_near(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tokens_stay_on_the_device_and_in_the_dtype(tiny_sd_folder, pictures, device, dtype):
    encoder = DiffusionEncoder.from_pretrained(
        tiny_sd_folder, device=device, dtype=dtype, **OPTIONS
    )
    tokens = encoder(pictures, PROMPTS)
    assert tokens.device.type == device.type
    assert tokens.dtype == dtype
    assert tokens.shape[0] == len(pictures)
    assert tokens.shape[2] == encoder.hidden_size
