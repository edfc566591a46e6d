import pytest
import torch
from diffusers import UNet2DConditionModel

from diffenc.denoiser.hooks import ForwardTaps
from diffenc.denoiser.shortening import shortened
from diffenc.models import load_backbone

FOLDERS = ["tiny_sd_folder", "tiny_sd21_folder", "tiny_sdxl_folder"]
TAPS = [
    "up_blocks.0",
    "up_blocks.1",
    "up_blocks.0.resnets.1",
    "up_blocks.1.attentions.1",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",
    "mid_block",
    "down_blocks.1",
    "up_blocks.2",
]


@pytest.fixture(scope="module", params=FOLDERS)
def backbone(request):
    """Shared by all tests: none changes it."""
    return load_backbone(request.getfixturevalue(request.param))


def read(backbone, unet, taps, height, width):
    torch.manual_seed(0)
    sample = torch.randn(2, 4, height, width)
    embeds = backbone.embed(["red", "blue"], size=(64, 64))
    with torch.no_grad(), ForwardTaps(unet, taps) as reader:
        return reader.run(lambda: unet(sample, 50, **embeds.unet_kwargs()))


@pytest.mark.parametrize("size", [(8, 8), (36, 44), (33, 35), (9, 16)], ids=str)
def test_a_truncated_unet_is_exact_at_every_size(backbone, size):
    whole = read(backbone, backbone.unet, TAPS, *size)
    for tap in TAPS:
        short = read(backbone, shortened(backbone.unet, [tap]), [tap], *size)
        assert torch.equal(short[tap], whole[tap]), tap


def test_what_lies_behind_is_gone_and_the_original_is_untouched(backbone):
    before = {name for name, _ in backbone.unet.named_parameters()}
    short = shortened(backbone.unet, ["mid_block", "up_blocks.0.resnets.1"])
    left = {name for name, _ in short.named_parameters()}
    assert left < before
    assert not any(name.startswith(("up_blocks.1.", "conv_out", "conv_norm")) for name in left)
    assert not any(name.startswith("up_blocks.0.resnets.2") for name in left)
    assert any(name.startswith("up_blocks.0.resnets.1.") for name in left)
    assert {name for name, _ in backbone.unet.named_parameters()} == before
    shared = dict(short.named_parameters())["conv_in.weight"]
    assert shared is backbone.unet.conv_in.weight
    assert isinstance(short, UNet2DConditionModel)


def test_the_last_of_several_taps_decides(backbone):
    short = shortened(backbone.unet, ["up_blocks.0.resnets.0", "up_blocks.1.resnets.0", "conv_in"])
    names = {name for name, _ in short.named_modules()}
    assert "up_blocks.0.resnets.2" in names
    assert "up_blocks.1.resnets.0" in names
    assert "up_blocks.1.resnets.1" not in names


@pytest.mark.long
@pytest.mark.parametrize("size", [(8, 8), (9, 7)], ids=str)
def test_a_truncated_unet_compiles_without_graph_breaks(tiny_unet, size):
    tap = "up_blocks.0"
    short = shortened(tiny_unet, [tap])
    compiled = torch.compile(short.forward, backend="eager", fullgraph=True)
    sample, states = torch.randn(2, 4, *size), torch.randn(2, 5, 8)
    step = torch.tensor(10)
    with torch.no_grad():
        output = compiled(sample, step, states, return_dict=False)[0]
        with ForwardTaps(tiny_unet, [tap]) as taps:
            tiny_unet(sample, step, states)
    torch.testing.assert_close(output, taps[tap])
