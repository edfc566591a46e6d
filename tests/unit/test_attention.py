import math

import pytest
import torch

import builders
from diffenc.denoiser.attention import CrossAttnTaps, cross_attention_layers, word_token_positions
from diffenc.errors import PromptError, ShapeError, TapError

LAYER = "up_blocks.0.attentions.1.transformer_blocks.0.attn2"


@pytest.fixture
def unet(tiny_unet):
    yield tiny_unet
    left = [
        name
        for name, module in tiny_unet.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]
    assert left == []


def inputs(batch=2, height=8, width=12, length=5):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, 4, height, width, generator=generator)
    return sample, 10, torch.randn(batch, length, 8, generator=generator)


def brute_force_maps(unet, attn, grid, arguments):
    """Softmax per image, head and cell, from the inputs of the whole attention module."""
    seen = {}
    hook = attn.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.update(x=args[0], **kwargs), with_kwargs=True
    )
    unet(*arguments)
    hook.remove()
    queries = seen["x"] @ attn.to_q.weight.T
    keys = seen["encoder_hidden_states"] @ attn.to_k.weight.T
    d = queries.shape[-1] // attn.heads
    result = torch.zeros(len(queries), keys.shape[1], queries.shape[1])
    for head in range(attn.heads):
        part = slice(head * d, (head + 1) * d)
        for image in range(len(queries)):
            scores = queries[image, :, part] @ keys[image, :, part].T / math.sqrt(d)
            result[image] += scores.softmax(dim=1).T / attn.heads
    return result.view(len(queries), -1, *grid)


@pytest.mark.parametrize("layer", ["down_blocks.1", "mid_block", LAYER])
def test_maps_equal_a_softmax_by_hand(unet, layer):
    with CrossAttnTaps(unet, [layer], tokens=[3, 0]) as taps:
        unet(*inputs())
    ((name, maps),) = taps.maps().items()
    expected = brute_force_maps(unet, unet.get_submodule(name), maps.shape[2:], inputs())
    assert maps.shape[:2] == (2, 2)
    torch.testing.assert_close(maps, expected[:, [3, 0]], rtol=0, atol=1e-6)


def test_maps_of_all_tokens_sum_to_one_in_every_cell_and_layer(unet):
    with CrossAttnTaps(unet, tokens=range(5)) as taps:
        unet(*inputs())
    assert tuple(taps.maps()) == cross_attention_layers(unet)
    for maps in taps.maps().values():
        torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, *maps.shape[2:]))


def test_grids_are_not_square_where_the_latents_are_not(unet):
    with CrossAttnTaps(unet, tokens=[1]) as taps:
        unet(*inputs())
    grids = {tuple(maps.shape[2:]) for maps in taps.maps().values()}
    assert grids == {(4, 6)}


def test_the_output_is_bit_identical(unet):
    plain = unet(*inputs()).sample
    with CrossAttnTaps(unet, tokens=[1]):
        tapped = unet(*inputs()).sample
    assert torch.equal(plain, tapped)


def test_maps_are_float32_whatever_the_dtype():
    unet = builders.tiny_unet().bfloat16()
    sample, timestep, states = inputs()
    with CrossAttnTaps(unet, tokens=range(5)) as taps, torch.autocast("cpu", torch.bfloat16):
        unet(sample.bfloat16(), timestep, states.bfloat16())
    for maps in taps.maps().values():
        assert maps.dtype == torch.float32
        torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, *maps.shape[2:]))


def test_a_row_does_not_depend_on_the_rest_of_the_batch(unet):
    sample, timestep, states = inputs(batch=3)
    with CrossAttnTaps(unet, [LAYER], tokens=[2]) as taps:
        unet(sample, timestep, states)
        together = taps.maps()[LAYER]
        unet(sample[1:2], timestep, states[1:2])
        alone = taps.maps()[LAYER]
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("position", [5, 77])
def test_a_token_behind_the_text_is_an_error_and_leaves_no_hook(unet, position):
    with (
        CrossAttnTaps(unet, tokens=[1, position]),
        pytest.raises(ShapeError, match=f"no token {position}: the text has 5"),
    ):
        unet(*inputs())


def test_no_hook_survives_an_exception(unet):
    with pytest.raises(KeyboardInterrupt), CrossAttnTaps(unet, tokens=[1]):
        raise KeyboardInterrupt  # the fixture looks for what is left


def test_no_hook_survives_a_failure_on_entering(unet, monkeypatch):
    attn = unet.get_submodule(LAYER)
    monkeypatch.delattr(attn, "to_k")
    with pytest.raises(AttributeError, match="to_k"), CrossAttnTaps(unet, tokens=[1]):
        pass


def test_maps_without_a_run_are_an_error(unet):
    with CrossAttnTaps(unet, [LAYER], tokens=[1]) as taps:
        pass
    with pytest.raises(TapError, match="did not run"):
        taps.maps()


def test_an_unknown_layer_offers_near_ones(unet):
    with pytest.raises(TapError, match=r"attentions\.0.*The U-Net has it in \['down_blocks\.1'"):
        CrossAttnTaps(unet, ["up_block.0.attentions.0.transformer_blocks.0.attn2"], tokens=[1])
    with pytest.raises(TapError, match=r"no cross-attention in 'up_blocks\.1'"):
        CrossAttnTaps(unet, ["up_blocks.1"], tokens=[1])


@pytest.mark.parametrize("tokens", [[], [-1]])
def test_positions_must_exist(unet, tokens):
    with pytest.raises(ShapeError, match="0 or above"):
        CrossAttnTaps(unet, tokens=tokens)


TEXT = "a red circle left of a Zebra, red circles"


@pytest.mark.parametrize(
    ("word", "positions"),
    [
        ("circle", (3,)),  # not the "circl" of "circles"
        ("red", (2, 13)),
        ("red circle", (2, 3)),
        ("RED", (2, 13)),
        ("zebra", (7, 8, 9, 10, 11)),
        ("circles", (14, 15, 16)),
    ],
)
def test_word_pieces_are_found_together(tiny_tokenizer, word, positions):
    assert word_token_positions(tiny_tokenizer, TEXT, word) == positions


def test_one_occurrence_can_be_chosen(tiny_tokenizer):
    assert word_token_positions(tiny_tokenizer, TEXT, "red", occurrence=1) == (13,)
    with pytest.raises(PromptError, match="'red' stands 2 times"):
        word_token_positions(tiny_tokenizer, TEXT, "red", occurrence=2)


@pytest.mark.parametrize("word", ["", " ", "ircle", "circl", "ebra"])
def test_a_part_of_a_word_is_no_word(tiny_tokenizer, word):
    with pytest.raises(PromptError, match="is no word of"):
        word_token_positions(tiny_tokenizer, TEXT, word)


def test_a_missing_word_offers_near_ones(tiny_tokenizer):
    with pytest.raises(PromptError, match=r"'sircle' is no word .* Did you mean 'circle'"):
        word_token_positions(tiny_tokenizer, "a red circle", "sircle")


def test_a_word_that_was_cut_off_is_an_error(tiny_tokenizer):
    text = "a " * 74 + "red circle"
    assert word_token_positions(tiny_tokenizer, text, "red") == (75,)  # 76 is the end token
    with pytest.raises(PromptError, match=r"was cut off: it is token 76 .* reads 77"):
        word_token_positions(tiny_tokenizer, text, "circle")
    assert word_token_positions(tiny_tokenizer, "circle " + text, "circle") == (1,)


def test_tokens_that_the_unet_ignores_get_no_attention(unet):
    """A row that is padded has the maps that it has without its padding."""
    sample, timestep, states = inputs(length=5)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with CrossAttnTaps(unet, tokens=range(5)) as taps:
        unet(sample, timestep, states, encoder_attention_mask=mask)
    padded = taps.maps()
    with CrossAttnTaps(unet, tokens=range(3)) as taps:
        unet(sample[1:], timestep, states[1:, :3])
    for name, alone in taps.maps().items():
        assert padded[name][1, 3:].abs().max() == 0
        torch.testing.assert_close(padded[name][1:, :3], alone, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(padded[name].sum(dim=1)[0], torch.ones(alone.shape[2:]))
