import pytest
import torch

from diffenc.denoiser.hooks import ForwardTaps
from diffenc.errors import TapError

TAPS = [
    ("conv_in", 4, 1),
    ("down_blocks.1", 8, 2),
    ("mid_block", 8, 2),
    ("up_blocks.0.attentions.0", 8, 2),
    ("up_blocks.0.attentions.0.transformer_blocks.0", 8, 2),
    ("up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q", 8, 2),
    ("up_blocks.0", 8, 1),
    ("up_blocks.1.resnets.0.conv2", 4, 1),
]


def call(unet, height=8, width=8, batch=2):
    torch.manual_seed(1)
    return unet(torch.randn(batch, 4, height, width), 10, torch.randn(batch, 5, 8)).sample


def count_hooks(module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (6, 10)], ids=str)
@pytest.mark.parametrize(("name", "channels", "reduction"), TAPS, ids=str)
def test_shape_follows_the_latents(tiny_unet, name, channels, reduction, size):
    height, width = size
    with ForwardTaps(tiny_unet, [name]) as taps:
        call(tiny_unet, height, width)
    assert taps[name].shape == (2, channels, height // reduction, width // reduction)


def test_taps_do_not_change_the_output(tiny_unet):
    with ForwardTaps(tiny_unet, [name for name, *_ in TAPS]):
        tapped = call(tiny_unet)
    assert torch.equal(tapped, call(tiny_unet))


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 12)], ids=str)
def test_early_exit_gives_the_same_maps_and_runs_nothing_behind(tiny_unet, size):
    name = "up_blocks.0.resnets.0"
    ran = []
    handle = tiny_unet.conv_out.register_forward_hook(lambda *_: ran.append(True))
    try:
        with torch.no_grad(), ForwardTaps(tiny_unet, [name]) as taps:
            whole = taps.run(lambda: call(tiny_unet, *size))
        assert ran == [True]
        with torch.no_grad(), ForwardTaps(tiny_unet, [name], early_exit=True) as taps:
            early = taps.run(lambda: call(tiny_unet, *size))
        assert ran == [True]
    finally:
        handle.remove()
    assert torch.equal(early[name], whole[name])


def test_maps_come_in_the_order_asked_for(tiny_unet):
    names = ["up_blocks.0", "conv_in", "mid_block"]
    with ForwardTaps(tiny_unet, names, early_exit=True) as taps:
        assert list(taps.run(lambda: call(tiny_unet))) == names


def test_token_outputs_are_laid_out_as_their_transformer_saw_them(tiny_unet):
    """The last transformer block's tokens, projected out by hand, are the transformer's output."""
    transformer = tiny_unet.up_blocks[0].attentions[0]
    before = []
    handle = transformer.register_forward_pre_hook(lambda _m, args: before.append(args[0]))
    name = "up_blocks.0.attentions.0.transformer_blocks.0"
    with torch.no_grad(), ForwardTaps(tiny_unet, [name, name.rpartition(".tr")[0]]) as taps:
        call(tiny_unet, 6, 10)
    handle.remove()
    tokens = taps[name].flatten(2).transpose(1, 2)
    projected = transformer.proj_out(tokens).transpose(1, 2).reshape_as(before[0]) + before[0]
    torch.testing.assert_close(projected, taps["up_blocks.0.attentions.0"])


def test_no_hook_survives_success_or_an_exception(tiny_unet):
    before = count_hooks(tiny_unet)
    names = [name for name, *_ in TAPS]
    with ForwardTaps(tiny_unet, names):
        assert count_hooks(tiny_unet) > before
        call(tiny_unet)
    assert count_hooks(tiny_unet) == before
    with pytest.raises(RuntimeError), ForwardTaps(tiny_unet, names):
        tiny_unet(torch.zeros(1, 5, 8, 8), 10, torch.zeros(1, 5, 8))
    assert count_hooks(tiny_unet) == before


def test_an_unknown_name_is_refused_with_near_matches(tiny_unet):
    with pytest.raises(TapError, match=r"Did you mean '(mid_block|up_blocks\.1|down_blocks\.1)"):
        ForwardTaps(tiny_unet, ["mid_blok"])
