"""What `truncate=True` saves, as the page on cost states it, counted on the meta device."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffenc.models import describe
from diffenc.models.presets import preset_options
from diffenc.models.taps import count_parameters

STATED = [
    ("sd1.5", "gdf", 847.7, 23),
    ("sd1.5", "dift", 769.3, 172),
    ("sd1.5", None, 348.7, 974),
    ("sd2.1", "gdf", 853.7, 23),
    ("sd2.1", "cleandift", 774.2, 175),
    ("sd2.1", None, 351.7, 981),
    ("sdxl", "gdf", 2487.6, 152),
    ("sdxl", None, 1243.4, 2526),
]


def left_by_hand(config, taps) -> int:
    """Parameters of the modules that run up to the last tap, found by running it."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    owners = [
        name
        for name, module in unet.named_modules()
        if not list(module.children()) and any(True for _ in module.parameters())
    ]
    last = max(
        (int(tap.split(".")[1]), int(tap.split(".")[3]) if len(tap.split(".")) > 3 else 99)
        for tap in [*taps, "up_blocks.-1.resnets.-1"]
        if tap.startswith("up_blocks")
    )

    def runs(name: str) -> bool:
        if name in ("conv_norm_out", "conv_out"):
            return False
        if not name.startswith("up_blocks"):
            return True
        _, block, kind, index, *_ = name.split(".")
        if kind == "upsamplers":
            return (int(block), 99) <= last
        return (int(block), int(index)) <= last

    return sum(
        parameter.numel()
        for name in owners
        if runs(name)
        for parameter in unet.get_submodule(name).parameters(recurse=False)
    )


@pytest.mark.parametrize(("alias", "preset", "millions", "mebibytes"), STATED, ids=str)
def test_the_table_is_right(alias, preset, millions, mebibytes):
    told = describe(alias)
    taps = preset_options(preset, told.family)["taps"] if preset else ("mid_block",)
    config = told.configs["unet"]
    kept, whole = count_parameters(config, taps), count_parameters(config)
    assert kept == left_by_hand(config, taps)
    assert kept / 1e6 == pytest.approx(millions, abs=0.05)
    assert 2 * (whole - kept) / 2**20 == pytest.approx(mebibytes, abs=0.5)
