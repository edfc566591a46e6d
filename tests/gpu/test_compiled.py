"""A compiled U-Net on a GPU gives the eager one's features."""

import pytest
import torch

from diffenc import DiffusionEncoder

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

TAPS = ("mid_block", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q", "up_blocks.1")
PROMPTS = ["a red circle", "a blue square", "a photo"]
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02}


def load(folder, device, dtype):
    return DiffusionEncoder.from_pretrained(
        folder, device=device, dtype=dtype, taps=TAPS, size=64, conditioning="cfg", use_cache=False
    )


def assert_near(found, expected, tolerance):
    for tap, features in expected.items():
        limit = tolerance * float(features.abs().max())
        torch.testing.assert_close(found[tap], features, rtol=0, atol=limit)


@pytest.fixture(autouse=True)
def anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("folder", ["tiny_sd21_folder", "tiny_sdxl_folder"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_compiled_agrees_with_eager_without_graph_breaks(request, folder, pictures, device, dtype):
    encoder = load(request.getfixturevalue(folder), device, dtype)
    eager = encoder.extract(pictures, PROMPTS)
    encoder.compile(fullgraph=True)
    for _ in range(2):
        assert_near(encoder.extract(pictures, PROMPTS), eager, TOLERANCE[dtype])


def test_cuda_graphs_do_not_overwrite_features_that_were_returned(
    tiny_sd21_folder, pictures, device
):
    encoder = load(tiny_sd21_folder, device, torch.float16)
    expected = [encoder.extract(picture, "a red circle") for picture in pictures]
    encoder.compile(mode="reduce-overhead")
    found = [encoder.extract(picture, "a red circle") for picture in pictures for _ in range(2)]
    for index, features in enumerate(found):
        assert_near(features, expected[index // 2], TOLERANCE[torch.float16])


def test_other_batch_sizes_compile_again_and_agree(tiny_sd21_folder, pictures, device):
    encoder = load(tiny_sd21_folder, device, torch.float16)
    eager = {count: encoder.extract(pictures[:count], PROMPTS[:count]) for count in (1, 3)}
    encoder.compile(fullgraph=True)
    for count, expected in eager.items():
        found = encoder.extract(pictures[:count], PROMPTS[:count])
        assert_near(found, expected, TOLERANCE[torch.float16])
