"""Prompts beyond the text encoder's limit, in windows; the oracle cuts and encodes them by hand."""

import pytest
import torch

from diffenc import DiffusionEncoder
from diffenc.errors import ConfigError
from diffenc.inputs.prompts import PromptEmbeds, count_windows, tokenize_windows
from loaded import fresh

SIZE = (64, 64)
LONG = "a red circle left of a blue square " * 25
KINDS = ["tiny_sd_folder", "tiny_sd21_folder", "tiny_sdxl_folder"]


@pytest.fixture(params=KINDS)
def backbone(request):
    return fresh(request.getfixturevalue(request.param))


@pytest.fixture
def encoder(backbone):
    return DiffusionEncoder.from_pretrained(
        backbone, taps=("mid_block", "up_blocks.1"), size=64, long_prompts="chunk"
    )


def windows_by_hand(tokenizer, text) -> list[list[int]]:
    ids = tokenizer.encode(text, truncation=False)[1:-1]
    windows = []
    while ids or not windows:
        window = [tokenizer.bos_token_id, *ids[:75], tokenizer.eos_token_id]
        windows.append(window + [tokenizer.pad_token_id] * (77 - len(window)))
        ids = ids[75:]
    return windows


def states_by_hand(backbone, text) -> tuple[torch.Tensor, torch.Tensor | None]:
    towers = [(backbone.tokenizer, backbone.text_encoder)]
    if backbone.family == "sdxl":
        towers.append((backbone.tokenizer_2, backbone.text_encoder_2))
    rows, pooled = [], None
    for tokenizer, text_encoder in towers:
        states = []
        for window in windows_by_hand(tokenizer, text):
            output = text_encoder(torch.tensor([window]), output_hidden_states=True)
            if backbone.family == "sd":
                states.append(output.last_hidden_state)
                continue
            states.append(output.hidden_states[-2])
            if text_encoder is backbone.text_encoder_2 and pooled is None:
                pooled = output.text_embeds
        rows.append(torch.cat(states, dim=1))
    return torch.cat(rows, dim=-1), pooled


@pytest.mark.parametrize("text", [LONG, "circle " * 75, "circle " * 76, "red", "zigzag " * 40])
def test_windows_are_encoded_one_by_one_and_stand_side_by_side(backbone, text):
    embeds = backbone.embed([text], size=SIZE, long_prompts="chunk")
    states, pooled = states_by_hand(backbone, text)
    assert embeds.prompt_embeds.shape == states.shape
    torch.testing.assert_close(embeds.prompt_embeds, states, atol=1e-5, rtol=1e-5)
    assert embeds.truncated == (0,)
    if pooled is not None:
        torch.testing.assert_close(embeds.pooled_prompt_embeds, pooled, atol=1e-5, rtol=1e-5)


def test_the_limit_is_the_boundary_between_one_window_and_two(tiny_tokenizer):
    texts = ["", "circle " * 75, "circle " * 76, "circle " * 150, "circle " * 151]
    assert count_windows(tiny_tokenizer, texts) == (1, 1, 2, 2, 3)
    ids = tokenize_windows(tiny_tokenizer, texts[:3], (1, 2, 2))
    assert ids.shape == (5, 77)
    assert torch.equal(ids[0], ids[2])  # what is left over is the empty window
    assert torch.equal(ids[1], ids[3])


def test_a_prompt_within_the_limit_is_encoded_as_ever(backbone):
    for text in ("red circle", "", "circle " * 75):
        cut = backbone.embed([text], size=SIZE)
        chunked = backbone.embed([text], size=SIZE, long_prompts="chunk")
        assert torch.equal(chunked.prompt_embeds, cut.prompt_embeds)
        assert chunked.truncated == cut.truncated == (0,)


def test_only_chunks_hear_what_lies_behind_the_limit(backbone, encoder):
    cut = DiffusionEncoder.from_pretrained(backbone, taps=("mid_block",), size=64)
    image = torch.zeros(3, 64, 64)
    texts = [LONG + "red", LONG + "blue"]
    with torch.no_grad():
        deaf = [cut.extract(image, text) for text in texts]
        heard = [encoder.extract(image, text) for text in texts]
    assert torch.equal(deaf[0]["mid_block"], deaf[1]["mid_block"])
    assert not torch.allclose(heard[0]["mid_block"], heard[1]["mid_block"])
    assert deaf[0].truncated[0] > 75
    assert heard[0].truncated == (0,)


@pytest.mark.parametrize("conditioning", ["cond", "cfg"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_features_do_not_depend_on_the_other_prompts_of_the_batch(
    backbone, conditioning, batch_size
):
    encoder = DiffusionEncoder.from_pretrained(
        backbone,
        taps=("mid_block", "up_blocks.1"),
        size=64,
        long_prompts="chunk",
        conditioning=conditioning,
        batch_size=batch_size,
        use_cache=False,
    )
    images = torch.linspace(-1, 1, 4 * 3 * 64 * 64).reshape(4, 3, 64, 64)
    prompts = ["red", LONG, "blue circle", LONG * 2]
    together = encoder.extract(images, prompts)
    for row in range(4):
        alone = encoder.extract(images[row], prompts[row])
        for tap, expected in alone.items():
            difference = (together[tap][row] - expected[0]).abs().max()
            assert difference <= 1e-5 * expected.abs().max(), (row, tap)


def test_padding_is_no_part_of_a_row(backbone):
    """Without the mask the padded states would be attended to, and features would differ."""
    embeds = backbone.embed(["red", LONG], size=SIZE, long_prompts="chunk")
    assert embeds.lengths == (77, embeds.prompt_embeds.shape[1])
    mask = embeds.unet_kwargs()["encoder_attention_mask"]
    assert mask.sum(dim=1).tolist() == list(embeds.lengths)
    alone = embeds.select(0, 1)
    assert alone.lengths is None
    assert alone.prompt_embeds.shape[1] == 77
    joined = PromptEmbeds.concat([alone, embeds.select(1, 2)])
    assert joined.lengths == embeds.lengths
    assert torch.equal(joined.take([1, 0]).take([1, 0]).prompt_embeds, joined.prompt_embeds)


def test_remembered_prompts_know_how_they_were_encoded(backbone):
    image = torch.zeros(3, 64, 64)
    options = {"taps": ("mid_block",), "size": 64}
    chunked, cut = (
        DiffusionEncoder.from_pretrained(backbone, long_prompts=way, **options)
        for way in ("chunk", "truncate")
    )
    first = chunked.extract(image, LONG)["mid_block"]
    assert not torch.allclose(cut.extract(image, LONG)["mid_block"], first)
    hits = backbone.caches.prompts.hits
    assert torch.equal(chunked.extract(image, LONG)["mid_block"], first)
    assert backbone.caches.prompts.hits > hits


@pytest.mark.slow
def test_long_prompts_run_in_a_compiled_unet(tiny_sd_folder):
    torch._dynamo.reset()
    encoder = DiffusionEncoder.from_pretrained(
        tiny_sd_folder, taps="mid_block", size=64, long_prompts="chunk", conditioning="cfg"
    )
    image = torch.zeros(3, 64, 64)
    expected = encoder.extract(image, LONG)["mid_block"]
    encoder.clear_cache()
    encoder.compile(backend="eager", fullgraph=True)
    found = encoder.extract(image, LONG)["mid_block"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_bundled_model_has_a_limit_of_its_own():
    encoder = DiffusionEncoder.from_pretrained("shapes", long_prompts="chunk")
    limit = encoder.backbone.tokenizer.model_max_length
    embeds = encoder.backbone.embed(["red " * limit], size=SIZE, long_prompts="chunk")
    assert embeds.prompt_embeds.shape[1] == 2 * limit


@pytest.mark.wrong_type
def test_another_word_is_refused(backbone):
    with pytest.raises(ConfigError, match=r"long_prompts must be one of \['truncate', 'chunk'\]"):
        DiffusionEncoder.from_pretrained(backbone, long_prompts="cut")
