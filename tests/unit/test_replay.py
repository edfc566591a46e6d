"""A U-Net whose first outputs are known gives what the whole gives, and is itself left alone."""

import pytest
import torch

from diffenc.denoiser.replay import (
    down_path,
    output_counts,
    record,
    replayed,
    text_free_prefix,
)
from diffenc.models.taps import meta_inputs
from loaded import shared

KINDS = ["tiny_sd_folder", "tiny_sd21_folder", "tiny_sdxl_folder"]


@pytest.fixture(params=KINDS)
def unet(request):
    return shared(request.getfixturevalue(request.param)).unet


def inputs(unet, *, text=0):
    """Two rows of latents whose sides no level halves evenly, under a text."""
    generator = torch.Generator().manual_seed(3)
    words = torch.Generator().manual_seed(text)
    made = meta_inputs(unet.config, 8)
    states = torch.randn(2, 5, made["encoder_hidden_states"].shape[-1], generator=words)
    call = {
        "sample": torch.randn(2, 4, 9, 7, generator=generator),
        "timestep": torch.tensor([10, 400]),
        "encoder_hidden_states": states,
    }
    if (added := made.get("added_cond_kwargs")) is not None:
        shapes = {name: (2, value.shape[-1]) for name, value in added.items()}
        call["added_cond_kwargs"] = {
            name: torch.randn(shape, generator=words) for name, shape in shapes.items()
        }
    return call


@pytest.mark.parametrize("part", ["prefix", "down", "middle"])
@torch.no_grad()
def test_known_outputs_give_what_the_whole_unet_gives(unet, part):
    paths = text_free_prefix(unet) if part == "prefix" else down_path(unet, middle=part != "down")
    if not paths:
        assert unet.config.addition_embed_type == "text_time"
        return
    call = inputs(unet)
    outputs = record(unet, paths, lambda: unet(**call))
    assert [len(outputs[path]) for path in paths] == output_counts(unet, paths)
    expected = unet(**call).sample
    torch.testing.assert_close(replayed(unet, outputs)(**call).sample, expected, rtol=0, atol=0)


@torch.no_grad()
def test_the_prefix_is_the_same_under_every_text(unet):
    if paths := text_free_prefix(unet):
        first, second = (
            record(unet, paths, lambda text=text: unet(**inputs(unet, text=text)))
            for text in (0, 1)
        )
        for path in paths:
            torch.testing.assert_close(first[path], second[path], rtol=0, atol=0)


@torch.no_grad()
def test_a_replayed_copy_leaves_the_unet_as_it_was(unet):
    paths = down_path(unet)
    before = dict(unet.named_modules())
    outputs = record(unet, paths, lambda: unet(**inputs(unet)))
    twin = replayed(unet, outputs)
    assert dict(unet.named_modules()) == before
    assert not any(module._forward_hooks for module in unet.modules())
    assert twin.up_blocks is unet.up_blocks
    assert twin.get_submodule(paths[-1]) is not unet.get_submodule(paths[-1])


def test_modules_that_somebody_hooks_or_exchanged_run_as_usual(tiny_sd_folder):
    unet = shared(tiny_sd_folder).unet
    assert text_free_prefix(unet)
    handle = unet.conv_in.register_forward_hook(lambda *_: None)
    assert text_free_prefix(unet) == ()
    handle.remove()
    unet.forward = unet.forward  # as offloading does
    assert text_free_prefix(unet) == down_path(unet) == ()
    del unet.forward
    assert down_path(unet, middle=True)[-1] == "mid_block"


def test_a_denoiser_that_is_no_unet_has_nothing_to_reuse():
    assert text_free_prefix(torch.nn.Linear(2, 2)) == down_path(torch.nn.Linear(2, 2)) == ()
