"""Tokens of words in the place of a grid's: in the encoder, fused, in a tower, in a model."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from diffenc import DiffusionEncoder, EncoderConfig, FusedEncoder, Projector
from diffenc.errors import ConfigError, PromptError
from diffenc.hosts.prompts import PromptTokens
from diffenc.hosts.spec import TowerSpec
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.inputs.words import words_of, words_of_ids
from diffenc.mixing import MixingConfig
from diffenc.mllm import DiffusionVLM, tokens_per_image
from diffenc.passes.question_tokens import PLACE_CHANNELS, embed_places
from dit_builders import save_pixart
from loaded import fresh
from marks import wrong_type
from vlm_builders import picture, save_tiny_clip, save_tiny_lm

QUESTION, LONGER = "what color is the circle?", "is a red circle left of the blue square?"
TAPS = ("up_blocks.1", "up_blocks.2")


@pytest.fixture(scope="module")
def load(tiny_sd21_base_folder):
    def build(**options):
        usual = {"taps": TAPS, "size": 64, "tokens": "grid+words", "word_count": 4, "grid": 2}
        return DiffusionEncoder.from_pretrained(
            fresh(tiny_sd21_base_folder), **{**usual, **options}
        )

    return build


@pytest.fixture(scope="module")
def encoder(load):
    return load()


def close(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def waves(places):
    """Sine, then cosine, of each number at four octaves, by plain arithmetic."""
    rows = [
        [
            function(math.pi * number * 2**octave)
            for function in (math.sin, math.cos)
            for octave in range(4)
        ]
        for number in places
    ]
    return torch.tensor(rows).flatten()


@pytest.mark.long
def test_tokens_are_the_grids_and_then_those_of_words_each_with_its_place(encoder):
    tokens = encoder(picture(0), QUESTION)
    channels = sum(tap.channels for tap in encoder.feature_info)
    assert tokens.shape == (1, 4 + 4, channels + PLACE_CHANNELS) == (1, 8, encoder.hidden_size)
    assert sum(encoder.token_channels) == encoder.hidden_size
    cells, of_words = tokens[0].split([4, 4])
    close(cells[:, :channels], encoder.extract(picture(0), QUESTION).tokens()[0])
    side = 1 / 2 / math.sqrt(12)
    close(cells[1, channels:], waves([0.25, 0.75, side, side]))
    close(cells[2, channels:], waves([0.75, 0.25, side, side]))
    words = encoder.word_tokens(picture(0), QUESTION, count=3, rest=True)
    close(of_words[:, :channels], words.tokens[0])
    cell = 1 / (12 * words.maps.shape[-1] ** 2)
    for row, (up, left, *spreads) in zip(of_words, words.places[0].tolist(), strict=True):
        areas = [math.sqrt(spread**2 + cell) for spread in spreads]
        close(row[channels:], waves([up, left, *areas]), tolerance=1e-4)


@pytest.mark.long
def test_words_alone_are_what_stands_behind_the_grid(load, encoder):
    alone = load(tokens="words")(picture(0), QUESTION)
    close(alone, encoder(picture(0), QUESTION)[:, 4:])


def test_without_a_word_one_token_has_the_mean_of_the_cells_and_the_others_are_zeros(encoder):
    channels = sum(tap.channels for tap in encoder.feature_info)
    for prompt in (None, "", "?!"):
        with pytest.warns(match="and there is none") if prompt is None else nullcontext():
            words = encoder(picture(0), prompt)[0, 4:]
        assert not words[:3].any()
        features = encoder.extract(picture(0), prompt)
        means = torch.cat([maps.mean(dim=(-2, -1))[0] for maps in features.values()])
        close(words[3, :channels], means)
        close(words[3, channels:], waves([0.5, 0.5, 1 / math.sqrt(12), 1 / math.sqrt(12)]), 1e-4)


def test_a_batch_with_and_without_words_is_equal_to_its_rows(encoder):
    prompts = [QUESTION, "", LONGER, "circle"]
    together = encoder([picture(seed) for seed in range(4)], prompts)
    for seed, prompt in enumerate(prompts):
        close(together[seed : seed + 1], encoder(picture(seed), prompt), tolerance=2e-4)
    assert not together[3, 5:7].any()
    assert together[3, 4].any()


def test_one_token_of_words_is_of_the_rest(load, encoder):
    one = load(word_count=1, tokens="words")(picture(0), QUESTION)
    rest = encoder.word_tokens(picture(0), QUESTION, count=1, rest=True)
    close(one[0, 0, :-PLACE_CHANNELS], rest.tokens[0, 1])


def test_words_read_the_text_where_features_do_not(load):
    blind = load(conditioning="uncond", tokens="words")
    one, other = (blind(picture(0), prompt) for prompt in (QUESTION, LONGER))
    assert (one - other).abs().max() > 1e-4
    words = blind.word_tokens(picture(0), QUESTION, count=3, rest=True)
    close(one[..., :-PLACE_CHANNELS], words.tokens)


def test_several_timesteps_and_both_halves(load):
    several = load(timestep=(50, 200), conditioning="concat")
    tokens = several(picture(0), [QUESTION])
    assert tokens.shape == (1, 2, 8, several.hidden_size)
    assert several.token_channels[-1] == PLACE_CHANNELS
    assert not torch.allclose(tokens[:, 0], tokens[:, 1])


def test_half_precision_is_near(load, tiny_sd21_base_folder):
    exact = load()(picture(0), QUESTION)
    half = DiffusionEncoder.from_pretrained(
        tiny_sd21_base_folder,
        dtype=torch.bfloat16,
        taps=TAPS,
        size=64,
        grid=2,
        tokens="grid+words",
        word_count=4,
    )(picture(0), QUESTION)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_an_adapter_learns_through_the_tokens_of_words(load):
    adapted = load(tokens="words")
    adapted.add_lora(rank=2)
    texts = [QUESTION, ""]  # the second has no word, and its tokens are zeros
    adapted([picture(0), picture(1)], texts).square().sum().backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if ".lora_B." in n]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_words_of_a_second_window_gather_too(load):
    filler = " ".join(["circle"] * 80)
    long = load(long_prompts="chunk", tokens="words", word_count=8)
    cut = load(tokens="words", word_count=8)
    windows = long(picture(0), f"{filler} square")[0]
    with pytest.warns(match="longer than the 77 tokens"):
        one = cut(picture(0), f"{filler} square")[0]
    present = [int(rows.any(dim=-1).sum()) for rows in (windows, one)]
    assert present == [3, 2]  # circle, square and the rest; circle and the rest


@pytest.mark.long
def test_sdxl_has_them(tiny_sdxl_folder):
    encoder = DiffusionEncoder.from_pretrained(
        fresh(tiny_sdxl_folder), taps=("up_blocks.1",), size=64, tokens="words", word_count=3
    )
    tokens = encoder([picture(0), picture(1)], [QUESTION, ""])
    assert tokens.shape == (2, 3, encoder.hidden_size)
    assert not tokens[1, :2].any()


def test_texts_that_were_encoded_without_their_words_are_refused(encoder):
    embeds = encoder.backbone.embed([QUESTION], size=(64, 64))
    with pytest.raises(PromptError, match="pass the texts themselves"):
        encoder(picture(0), embeds)
    assert isinstance(embeds, PromptEmbeds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        wrong_type({"tokens": "word"}, "tokens"),
        ({"word_count": 0}, "word_count"),
        wrong_type({"word_count": 2.5}, "word_count"),
    ],
)
def test_other_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EncoderConfig(**options)


# Words by their ids


TEXTS = [
    QUESTION,
    "isn't it the cats' star? the star's red, so-called",
    "ünïcödé 圆 circle — a “red” one",
    "the the circle the",
    "",
    "?!",
]


@pytest.mark.parametrize("text", TEXTS)
def test_words_by_ids_are_the_words_of_the_text(text, encoder):
    tokenizer = encoder.backbone.tokenizers[0]
    by_ids = words_of_ids(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    words = words_of(text) if any(letter.isalnum() for letter in text) else []
    assert [word.lower() for word in words] == list(by_ids)


def test_digits_are_words_and_so_are_added_tokens(encoder):
    tokenizer = fresh_tokenizer(encoder)
    tokenizer.add_tokens(["<toy>"])
    ids = tokenizer("12 <toy> circles", add_special_tokens=False)["input_ids"]
    words = words_of_ids(tokenizer, ids)
    assert list(words)[:3] == ["1", "2", "<toy>"]
    assert "".join(tokenizer.convert_ids_to_tokens([ids[p] for p in list(words.values())[3]])) == (
        "circles</w>"
    )


def fresh_tokenizer(encoder):
    return copy.deepcopy(encoder.backbone.tokenizers[0])


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    folder = save_pixart(tmp_path_factory.mktemp("pixart"))
    return DiffusionEncoder.from_pretrained(folder, tokens="grid+words", word_count=5, grid=2)


def test_a_transformer_that_reads_t5_has_them_too(pixart):
    tokens = pixart(picture(0), QUESTION)
    words = pixart.word_tokens(picture(0), QUESTION, count=4, rest=True)
    close(tokens[:, 4:, :-PLACE_CHANNELS], words.tokens)
    assert not pixart(picture(0), "")[0, 4:8].any()


@pytest.mark.parametrize("text", [QUESTION, "isn't it the cat's star, so to say?", "", "?!"])
def test_words_by_the_ids_of_t5_are_the_words_of_the_text(text, pixart):
    tokenizer = pixart.backbone.tokenizers[0]
    by_ids = words_of_ids(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    words = words_of(text) if any(letter.isalnum() for letter in text) else []
    assert list(by_ids) == words


# Fused


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_clips_grid_and_tokens_of_words_stand_in_one_row(load, clip):
    diffusion = load(tokens="words")
    fused = FusedEncoder(str(clip), diffusion, "tokens")
    tokens = fused(picture(0), QUESTION)
    assert tokens.shape == (1, fused.clip_tokens + 4, fused.hidden_size)
    assert tokens_per_image(fused) == tokens.shape[1]
    own = diffusion(picture(0), QUESTION)
    close(tokens[:, fused.clip_tokens :, -diffusion.hidden_size :], own)


@pytest.mark.parametrize("kind", ["words", "grid+words"])
@pytest.mark.parametrize("grid", [None, 3, (2, 5)])
@pytest.mark.parametrize("how", ["tokens", "cross_attention", "asked by words"])
def test_their_number_is_known_however_they_are_fused(load, clip, how, grid, kind):
    asks = MixingConfig(asks="diffusion", heads=1) if how == "asked by words" else None
    how = "cross_attention" if asks else how
    fused = FusedEncoder(str(clip), load(tokens=kind), how, grid=grid, mixing=asks)
    assert tokens_per_image(fused) == fused(picture(0), QUESTION).shape[1]


def test_absent_words_have_no_part_in_a_mixture(load, clip):
    mixing = MixingConfig(heads=1, residual=False)
    few, many = (
        FusedEncoder(
            str(clip), load(tokens="words", word_count=count), "cross_attention", mixing=mixing
        )
        for count in (3, 16)
    )
    close(few(picture(0), "red circle"), many(picture(0), "red circle"))


def test_clip_attends_to_tokens_of_words(load, clip):
    fused = FusedEncoder(str(clip), load(tokens="words"), "cross_attention")
    assert fused(picture(0), QUESTION).shape == (1, fused.clip_tokens, fused.hidden_size)


@pytest.mark.parametrize("how", ["channel", "interleave", "add", "token_gated"])
def test_ways_that_join_cell_by_cell_refuse_them(load, clip, how):
    with pytest.raises(ConfigError, match="tokens that are no cells"):
        FusedEncoder(str(clip), load(), how)


# Towers


@pytest.fixture(scope="module")
def tower():
    return DiffusionVisionTower("diffenc:shapes?tokens=grid%2Bwords&k=5&grid=2")


def test_a_tower_gives_what_the_encoder_gives(tower):
    shapes = tower.encoder
    pictures = [picture(seed, (128, 128)) for seed in range(3)]
    pixels = tower.image_processor(pictures, return_tensors="pt")["pixel_values"]
    prompts = [QUESTION, "how many stars are there?", "the cats' star isn't red"]
    tokens = tower(pixels, prompts)
    assert tokens.shape == (3, tower.num_patches, tower.hidden_size)
    close(tokens, shapes(pictures, prompts), tolerance=2e-5)
    with pytest.warns(match="called without one: all but the last of them are zeros"):
        alone = tower(pixels[:1])
    close(alone, shapes(pictures[:1], ""), tolerance=2e-5)


def test_rows_of_a_tower_that_stand_for_no_prompt_have_no_words(tower):
    pixels = torch.zeros(2, 3, tower.image_size, tower.image_size)
    rows = tower.tokenize([QUESTION, "how many stars are there?"])
    absent = PromptTokens(rows.ids, rows.mask * torch.tensor([[1], [0]]))
    tokens = tower(pixels, absent)
    assert tokens[0, 4:8].any(dim=-1).all()
    assert not tokens[1, 4:8].any()
    close(tokens[1:], tower(pixels[1:], absent.take([1])), tolerance=2e-5)


def test_a_spec_says_the_kind_of_tokens_and_their_number():
    spec = TowerSpec.parse("diffenc:shapes?tokens=words&k=16")
    assert (spec.tokens, spec.word_count, spec.num_patches) == ("words", 16, 16)
    assert TowerSpec.parse(str(spec)) == spec
    both = TowerSpec.parse("diffenc:shapes?tokens=grid+words&words=3&grid=4")
    assert (both.num_patches, both.hidden_size) == (19, 224 + PLACE_CHANNELS)
    assert TowerSpec.parse(str(both)) == both
    assert "." not in str(both)
    with pytest.raises(ConfigError, match="no square"):
        _ = spec.num_patches_per_side
    with pytest.raises(ConfigError, match="k=0"):
        TowerSpec.parse("diffenc:shapes?tokens=words&k=0")


# Language models


@pytest.mark.long
def test_a_language_model_takes_them_and_comes_back(load, tmp_path, tiny_sd21_base_folder):
    encoder = DiffusionEncoder.from_pretrained(
        tiny_sd21_base_folder, taps=TAPS, size=64, tokens="grid+words", word_count=4, grid=2
    )
    vlm = DiffusionVLM(encoder, str(save_tiny_lm(tmp_path / "lm")))
    pictures, prompts = [picture(0), picture(1)], [QUESTION, ""]
    tokens = vlm.encode_images(pictures, prompts)
    assert tokens.shape == (2, vlm.tokens_per_image, encoder.hidden_size)
    assert vlm.projector(tokens).isfinite().all()
    vlm.save_pretrained(tmp_path / "vlm")
    again = DiffusionVLM.from_pretrained(tmp_path / "vlm")
    assert torch.equal(again.encode_images(pictures, prompts), tokens)
    assert vlm.generate(picture(0), QUESTION, max_new_tokens=2)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": "words"},
        {"tokens": "grid+words"},
        {"tokens": "grid+words", "grid": None},
        {"tokens": "words", "resize": "none", "size": None},
    ],
)
def test_their_number_is_known_before_a_picture_is_seen(load, options):
    encoder = load(**options)
    assert tokens_per_image(encoder) == encoder(picture(0), QUESTION).shape[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": "words", "word_count": 16}, "no grid of one size"),
        ({"tokens": "grid+words", "grid": (2, 4), "word_count": 8}, "no grid of one size"),
        ({"tokens": "grid", "word_count": 8, "grid": (2, 8)}, "a grid of 2 x 8"),
        ({"tokens": "grid", "word_count": 8, "grid": None, "resize": "none"}, "no grid of one"),
    ],
)
def test_a_projector_resamples_no_square_that_is_none(load, tmp_path, options, said):
    """Though the number of tokens is a square in each case."""
    encoder = load(**options)
    projector = Projector(encoder.hidden_size, 16, grid=2)
    with pytest.raises(ConfigError, match=said):
        DiffusionVLM(encoder, str(save_tiny_lm(tmp_path)), projector=projector)


def test_prompts_may_come_from_an_iterator(load):
    encoder, texts = load(tokens="words"), [QUESTION, LONGER]
    pictures = [picture(0), picture(1)]
    assert torch.equal(encoder(pictures, iter(texts)), encoder(pictures, texts))


def test_a_number_of_words_without_words_is_refused(load, tmp_path):
    with pytest.raises(ConfigError, match="read with tokens='words' or 'grid\\+words' alone"):
        EncoderConfig(word_count=3)
    load().save_pretrained(tmp_path)
    assert DiffusionEncoder.from_pretrained(tmp_path, tokens="grid").config.word_count == 8


def test_places_far_apart_stay_apart_under_a_layer_norm():
    grid = torch.cartesian_prod(*[torch.linspace(0.05, 0.95, 10)] * 2)
    places = torch.cat([grid, torch.full((100, 2), 0.1)], dim=1)
    normed = torch.nn.functional.layer_norm(embed_places(places), (PLACE_CHANNELS,))
    distances = torch.cdist(normed, normed) + 10 * torch.eye(100)
    assert distances.min() > 0.5
    assert np.isfinite(distances.numpy()).all()
