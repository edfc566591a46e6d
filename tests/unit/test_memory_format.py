import copy

import pytest
import torch

from diffenc import DiffusionEncoder, load_backbone
from diffenc.models.memory_format import DEFAULT, arrange

OPTIONS = {"taps": ("mid_block", "up_blocks.1"), "size": (64, 96), "use_cache": False}


def formats(module) -> set[bool]:
    """Whether convolutions over more than one cell and channel have channels last."""
    weights = [
        m.weight
        for m in module.modules()
        if isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1) and m.in_channels > 1
    ]
    return {w.is_contiguous(memory_format=torch.channels_last) for w in weights}


@pytest.fixture(params=["tiny_sd_folder", "tiny_sdxl_folder"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.mark.long
def test_the_format_changes_no_feature(folder):
    image = torch.linspace(-1, 1, 3 * 64 * 96).reshape(3, 64, 96)
    expected = None
    for channels_last in (False, True, None):
        encoder = DiffusionEncoder.from_pretrained(folder, channels_last=channels_last, **OPTIONS)
        wanted = dict.fromkeys(DEFAULT, channels_last) if channels_last is not None else DEFAULT
        assert formats(encoder.backbone.vae) == {wanted["vae"]}
        assert formats(encoder.backbone.unet) == {wanted["unet"]}
        found = encoder.extract(image, "red", conditioning="cfg")
        expected = expected or found
        for tap, features in found.items():
            assert features.is_contiguous()
            difference = (features - expected[tap]).abs().max()
            assert difference <= 1e-5 * expected[tap].abs().max()


@pytest.mark.long
def test_the_format_survives_moves_casts_copies_and_loading(folder):
    backbone = load_backbone(folder, channels_last=True)
    for changed in (
        backbone.to("cpu"),
        copy.deepcopy(backbone).to(torch.bfloat16),
        copy.deepcopy(backbone).half().float(),
    ):
        assert formats(changed.vae) == formats(changed.unet) == {True}
    backbone.load_state_dict(load_backbone(folder, channels_last=False).state_dict())
    assert formats(backbone.vae) == {True}


def test_a_backbone_is_rearranged_in_place(folder):
    backbone = load_backbone(folder, channels_last=True)
    assert arrange(backbone, channels_last=False) is backbone
    assert formats(backbone.vae) == formats(backbone.unet) == {False}
    assert load_backbone(backbone, channels_last=True) is backbone
    assert formats(backbone.unet) == {True}


def test_a_call_runs_in_the_format_of_its_weights(tiny_sd_folder):
    backbone = load_backbone(tiny_sd_folder, channels_last=True)
    seen = []
    backbone.vae.encoder.conv_in.register_forward_hook(
        lambda _m, _a, output: seen.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    DiffusionEncoder.from_pretrained(backbone, **OPTIONS)(torch.zeros(3, 64, 96))
    assert seen == [True]
