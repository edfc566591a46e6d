"""The arithmetic that the pages on cost state, counted on the meta device at real size."""

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from diffenc.denoiser.hooks import ForwardTaps
from diffenc.models import describe


def teraflops(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 1e12


@pytest.mark.long
@pytest.mark.parametrize(
    ("alias", "taps", "whole", "share"),
    [("sd2.1-base", ["up_blocks.1"], 0.804, 0.547), ("sdxl", None, 1.589, 0.841)],
)
def test_early_exit_saves_the_share_that_is_stated(alias, taps, whole, share):
    told = describe(alias)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(told.configs["unet"]).eval()
        states = torch.empty(1, 77, unet.config.cross_attention_dim)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        inputs = (torch.empty(1, 4, 64, 64), torch.empty((), dtype=torch.long), states)

    def run() -> None:
        unet(*inputs, added_cond_kwargs=added)

    def read() -> None:
        with ForwardTaps(unet, taps or told.default_taps, early_exit=True) as reader:
            reader.run(run)

    full = teraflops(run)
    assert full == pytest.approx(whole, abs=0.001)
    assert teraflops(read) / full == pytest.approx(share, abs=0.001)


def test_one_encoding_costs_more_than_a_pass_of_sd21():
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(describe("sd2.1-base").configs["vae"]).eval()
        pixel_values = torch.empty(1, 3, 512, 512)
    assert teraflops(lambda: vae.encode(pixel_values)) == pytest.approx(1.117, abs=0.001)
