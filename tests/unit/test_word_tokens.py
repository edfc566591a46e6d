"""Tokens that the words of a text gather: what they are made of, and what they are masked by."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from diffenc import DiffusionEncoder
from diffenc.denoiser.gathering import as_shares, gather, join_layers, most_telling, places
from diffenc.errors import ConfigError, PromptError, TapError
from diffenc.shapes import render, sample_scenes
from loaded import fresh

TEXT = "a red circle left of a blue square"
TAPS = ("up_blocks.1",)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.fixture(scope="module")
def load(tiny_sd21_base_folder):
    def build(**options):
        source = tiny_sd21_base_folder if "dtype" in options else fresh(tiny_sd21_base_folder)
        return DiffusionEncoder.from_pretrained(source, **{"taps": TAPS, "size": 64, **options})

    return build


@pytest.fixture(scope="module")
def encoder(load):
    return load()


def close(ours, expected, rtol=1e-4):
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=1e-5)


# Pure functions


def test_a_layer_that_looks_everywhere_has_no_say():
    sharp = torch.zeros(1, 1, 4, 4)
    sharp[0, 0, 1, 2] = 0.3
    joined = join_layers([torch.full((1, 1, 4, 4), 0.9), sharp, torch.full((1, 1, 2, 2), 0.9)])
    close(joined, sharp / 0.3)


def test_two_layers_count_by_their_divergence_from_the_uniform_map():
    half, quarter = torch.zeros(2, 1, 1, 4, 4)
    half[..., :2, :], quarter[..., :1, :] = 1, 1
    joined = join_layers([half, quarter])[0, 0]
    near, far = math.log(4) / math.log(8) / 4, math.log(2) / math.log(8) / 8
    close(joined[0], torch.full((4,), near + far))
    close(joined[1], torch.full((4,), far))


def test_a_token_is_the_weighted_mean_and_an_empty_map_gives_zeros():
    features = torch.arange(8.0).reshape(1, 2, 2, 2)
    maps = torch.tensor([[[[0.0, 3.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    close(gather(features, maps), torch.tensor([[[1.5, 5.5], [0.0, 0.0]]]))


def test_the_power_of_a_map_lets_peaks_count_without_underflow():
    maps = torch.tensor([[[1e-4, 2e-4], [0.0, 0.0]]])
    close(as_shares(maps)[0, 0], torch.tensor([1 / 3, 2 / 3]))
    close(as_shares(maps, power=2)[0, 0], torch.tensor([0.2, 0.8]))
    close(as_shares(maps, power=20)[0, 0], torch.tensor([0.0, 1.0]))


def test_gradients_are_those_of_small_steps_and_finite_where_there_is_no_word():
    rng = np.random.default_rng(0)
    maps = torch.from_numpy(rng.random((1, 3, 4, 4)))
    maps[0, 1] = 0  # an absent word
    maps[0, 0, 2, 1] = 0  # a cell that does not look at the word
    features = torch.from_numpy(rng.standard_normal((1, 5, 4, 4)))

    def tokens(maps):
        shares = as_shares(join_layers([maps, maps.square()]), 2.0)
        return gather(features.to(maps.dtype), shares)

    for dtype in (torch.float32, torch.float64):
        leaf = maps.to(dtype, copy=True).requires_grad_()
        (tokens(leaf).sum(-1) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        assert leaf.grad.isfinite().all()
        for power in (0.5, 1.0, 3.0):
            other = maps.to(dtype, copy=True).requires_grad_()
            as_shares(other, power).square().sum().backward()
            assert other.grad.isfinite().all(), power
    for word, row, column in ((0, 0, 0), (0, 3, 2), (2, 1, 1)):
        step = torch.zeros_like(maps)
        step[0, word, row, column] = 1e-6
        slope = (tokens(maps + step) - tokens(maps - step)).sum(-1)[0, word] / 2e-6
        close(leaf.grad[0, word, row, column], (word + 1) * slope)


def test_a_place_is_the_centre_and_the_spread_in_fractions_of_the_sides():
    maps = torch.zeros(2, 4, 2)
    maps[0, 3, 0] = 1
    maps[1, 0] = 0.5
    close(places(maps), torch.tensor([[0.875, 0.25, 0, 0], [0.125, 0.5, 0, 0.25]]))
    assert not places(torch.zeros(1, 4, 2)).any()


def test_words_are_chosen_that_are_sharp_and_lie_apart():
    maps = torch.full((1, 4, 4, 4), 1e-3)
    maps[0, 1, 0, 0] = 1.0  # the sharpest
    maps[0, 2, 0, 0] = 0.9  # says the same
    maps[0, 3, 3, 3] = 0.3  # elsewhere
    present = torch.ones(1, 4, dtype=torch.bool)
    assert most_telling(as_shares(maps), present, 2).tolist() == [[False, True, False, True]]
    present[0, 1] = False
    assert most_telling(as_shares(maps), present, 9).tolist() == [[True, False, True, True]]


# The encoder


@pytest.mark.long
def test_a_picture_has_the_tokens_that_it_has_alone_and_absent_ones_are_zero(encoder):
    prompts = [TEXT, "a blue circle"]
    both = encoder.word_tokens([picture(0), picture(1)], prompts)
    assert both.words == (
        ("a", "red", "circle", "left", "of", "blue", "square"),
        ("a", "blue", "circle", "", "", "", ""),
    )
    assert both.mask.tolist() == [[True] * 7, [True] * 3 + [False] * 4]
    for row, prompt in enumerate(prompts):
        alone = encoder.word_tokens(picture(row), prompt)
        count = len(alone.words[0])
        for name in ("tokens", "places", "maps"):
            close(getattr(both, name)[row, :count], getattr(alone, name)[0])
            assert not getattr(both, name)[row, count:].any()
    close(both.maps.sum(dim=(-2, -1)), both.mask.float())


def test_one_text_serves_all_pictures(encoder):
    both = encoder.word_tokens([picture(0), picture(1)], "a blue circle")
    assert both.words == (("a", "blue", "circle"),) * 2
    assert both.mask.all()


def test_named_words_keep_their_columns_and_are_absent_where_the_text_has_none(encoder):
    prompts = [TEXT, "a blue circle"]
    ours = encoder.word_tokens([picture(0), picture(1)], prompts, ["square", "Circle", "a blue"])
    assert ours.mask.tolist() == [[True, True, True], [False, True, True]]
    assert ours.words == (("square", "Circle", "a blue"), ("", "Circle", "a blue"))
    whole = encoder.word_tokens(picture(0), TEXT)
    close(ours.tokens[0, 1], whole.tokens[0, 2])
    with pytest.raises(PromptError, match="'zebra' is no word of"):
        encoder.word_tokens([picture(0), picture(1)], prompts, ["zebra", "circle"])


def test_features_are_those_of_a_pass_without_words(encoder):
    ours = encoder.word_tokens(picture(), TEXT)
    plain = encoder.extract(picture(), TEXT)
    assert torch.equal(ours.features["up_blocks.1"], plain["up_blocks.1"])


@pytest.mark.parametrize(("layers", "runs"), [(None, False), ("up_blocks.2", True)])
def test_the_pass_goes_on_behind_the_last_tap_only_where_layers_lie_there(encoder, layers, runs):
    called = []
    blocks = encoder.backbone.unet.up_blocks
    handles = [
        blocks[index].register_forward_pre_hook(lambda *_, index=index: called.append(index))
        for index in (2, 3)
    ]
    try:
        encoder.word_tokens(picture(), TEXT, layers=layers)
    finally:
        for handle in handles:
            handle.remove()
    assert called == ([2] if runs else [])


@pytest.mark.parametrize(
    ("taps", "expected"),
    [
        (("up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q",), ["1.0", "1.1"]),
        (("up_blocks.1.resnets.2",), ["1.0", "1.1"]),
        (("up_blocks.1", "latents"), ["1.0", "1.1", "1.2"]),
    ],
)
def test_layers_are_those_of_the_decoder_that_a_tap_depends_on_or_lies_in(load, taps, expected):
    from diffenc.passes.word_tokens import word_layers

    read = word_layers(load().backbone, taps, None)
    assert [f"{name.split('.')[1]}.{name.split('.')[3]}" for name in read] == expected


def test_a_tap_before_the_decoder_is_read_by_the_layers_before_it_and_latents_by_all(load):
    from diffenc.passes.word_tokens import word_layers

    backbone = load().backbone
    early = word_layers(backbone, ("down_blocks.0",), None)
    assert {name.rpartition(".attentions")[0] for name in early} == {"down_blocks.0"}
    assert len(word_layers(backbone, ("latents",), None)) == 16
    with pytest.raises(TapError, match="no cross-attention in"):
        word_layers(backbone, TAPS, "up_blocks.7")


def test_tokens_of_latents_alone_are_means_of_latents(load):
    ours = load(taps=("latents",)).word_tokens(picture(), TEXT, "circle")
    latents = ours.features["latents"]
    close(ours.tokens[0, 0], (latents[0] * ours.maps[0, 0]).sum(dim=(1, 2)))


def test_several_timesteps_have_tokens_maps_and_places_each(load):
    several = load(timestep=(50, 261)).word_tokens([picture(0), picture(1)], TEXT, count=3)
    assert several.tokens.shape[:3] == (2, 2, 3)
    assert several.maps.shape[:3] == several.places.shape[:3] == (2, 2, 3)
    assert several.question_maps().shape[:2] == (2, 2)
    for index, timestep in enumerate((50, 261)):
        words = several.words[1]
        alone = load(timestep=timestep).word_tokens(picture(1), TEXT, words)
        close(several.tokens[1, index], alone.tokens[0])
        close(several.places[1, index], alone.places[0])


def test_a_number_of_words_is_the_number_of_tokens_of_every_picture(encoder):
    ours = encoder.word_tokens([picture(0), picture(1)], [TEXT, "a circle"], count=4, rest=True)
    assert ours.tokens.shape[:2] == (2, 5)
    assert ours.mask.sum(dim=1).tolist() == [5, 3]
    assert [len(words) for words in ours.words] == [5, 5]
    order = [TEXT.split().index(word) for word in ours.words[0][:4]]
    assert order == sorted(order)
    assert ours.words[1] == ("a", "circle", "", "", "<rest>")
    whole = encoder.word_tokens(picture(0), TEXT, rest=True)
    for index, word in enumerate(ours.words[0]):
        close(ours.tokens[0, index], whole.tokens[0, whole.words[0].index(word)])


def test_halves_are_gathered_by_one_map(load):
    encoder = load()
    without, under, joined = (
        encoder.word_tokens(picture(), TEXT, conditioning=kind)
        for kind in ("uncond", "cond", "concat")
    )
    close(without.maps, under.maps)
    close(joined.tokens, torch.cat([without.tokens, under.tokens], dim=-1))
    plain = encoder.extract(picture())["up_blocks.1"]
    weights = torch.nn.functional.interpolate(without.maps, plain.shape[-2:], mode="bilinear")
    weights = weights / weights.sum(dim=(-2, -1), keepdim=True)
    close(without.tokens[0], (weights[0, :, None] * plain[0]).sum(dim=(-2, -1)))


@pytest.mark.long
def test_half_precision_gathers_in_float32(load):
    full = load(dtype="float32").word_tokens(picture(), TEXT)
    half = load(dtype="bfloat16").word_tokens(picture(), TEXT)
    assert half.tokens.dtype == half.with_places().dtype == torch.bfloat16
    assert half.maps.dtype == half.places.dtype == torch.float32
    torch.testing.assert_close(half.tokens.float(), full.tokens, rtol=0.1, atol=0.05)
    torch.testing.assert_close(half.places, full.places, rtol=0.02, atol=0.01)


def test_under_autocast_maps_are_summed_in_float32(encoder):
    plain = encoder.word_tokens(picture(), TEXT, rest=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = encoder.word_tokens(picture(), TEXT, rest=True)
    close(cast.maps.sum(dim=(-2, -1)), torch.ones(1, 8))
    torch.testing.assert_close(cast.places, plain.places, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("part", ["tokens", "places"])
def test_gradients_reach_lora_through_tokens_and_through_places(load, part):
    encoder = load()
    encoder.add_lora(rank=2)
    getattr(encoder.word_tokens(picture(), TEXT, "circle"), part)[..., 0].sum().backward()
    gradients = {
        name: parameter.grad.abs().sum()
        for name, parameter in encoder.named_parameters()
        if parameter.grad is not None and "lora_B" in name
    }
    reached = [name for name, size in gradients.items() if size > 0 and "up_blocks.1" in name]
    assert any("attn2.to_q" in name for name in reached)
    assert any("attn2.to_k" in name for name in reached)


@pytest.mark.long
def test_a_word_of_a_second_window_gathers_and_a_cut_one_is_absent(load):
    long_text = "red " * 80 + "circle"
    with pytest.warns(match="longer than the 77 tokens"):
        cut = load().word_tokens(picture(), long_text)
    assert cut.words == (("red",),)
    with pytest.raises(PromptError, match="was cut off"):
        load().word_tokens(picture(), long_text, "circle")
    windows = load(long_prompts="chunk")
    whole = windows.word_tokens(picture(), long_text)
    assert whole.words == (("red", "circle"),)
    both = windows.word_tokens([picture(1), picture()], ["a circle", long_text])
    assert both.words == (("a", "circle"), ("red", "circle"))
    close(both.tokens[1], whole.tokens[0])
    alone = windows.word_tokens(picture(1), "a circle")
    close(both.tokens[0], alone.tokens[0])


def test_a_batch_in_parts_has_the_tokens_of_one_call(load):
    prompts = ["a circle", "red " * 80 + "circle"]
    pictures = [picture(0), picture(1)]
    one = load(long_prompts="chunk").word_tokens(pictures, prompts)
    parts = load(long_prompts="chunk", batch_size=1).word_tokens(pictures, prompts)
    close(parts.tokens, one.tokens)
    close(parts.maps, one.maps)


def test_a_question_map_joins_words_by_their_sharpness(encoder):
    ours = encoder.word_tokens(picture(), TEXT, rest=True)
    maps = ours.maps[0, :-1]
    cells = maps[0].numel()
    weights = [float((m * (m * cells).log()).sum()) for m in maps]
    expected = sum(w * m for w, m in zip(weights, maps, strict=True)) / sum(weights)
    close(ours.question_maps()[0], expected)


def test_a_change_map_is_the_length_of_what_the_text_adds(encoder):
    ours = encoder.word_tokens(picture(), TEXT, conditioning="concat")
    without, under = (ours.features.select(kind)["up_blocks.1"] for kind in ("uncond", "cond"))
    expected = (under - without).norm(dim=1) / without.norm(dim=1).mean()
    close(ours.question_maps("change"), expected)
    with pytest.raises(ConfigError, match=r"word_tokens\(\.\.\., conditioning=\"cfg\"\)"):
        encoder.word_tokens(picture(), TEXT).question_maps("change")


def test_a_change_map_is_of_the_taps_that_are_named(load):
    names = ["up_blocks.1", "up_blocks.2"]
    both = load(taps=names).word_tokens(picture(), TEXT, conditioning="concat")
    for name in names:
        alone = load(taps=name).word_tokens(picture(), TEXT, conditioning="concat")
        close(both.question_maps("change", taps=name), alone.question_maps("change"))
    close(both.question_maps("change", taps=names), both.question_maps("change"))
    with pytest.raises(TapError, match=r"no tap 'up_blocks.3' was read. Did you mean 'up_blocks"):
        both.question_maps("change", taps="up_blocks.3")
    with pytest.raises(ConfigError, match='taps are for the question map "change"'):
        both.question_maps(taps=names)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"power": 0}, ConfigError, "power must be above 0"),
        ({"count": 0}, ConfigError, "count"),
        ({"rest": 2}, ConfigError, "rest"),
        ({"words": []}, PromptError, "words"),
        ({"words": ["red", "red"]}, PromptError, "names 'red' twice"),
        ({"guidance_scale": 4.0}, ConfigError, "guidance_scale"),
        ({"prompts": None}, PromptError, "pass texts"),
        ({"prompts": " . "}, PromptError, "no words"),
    ],
)
def test_bad_input_is_refused_with_what_is_wrong(encoder, options, error, message):
    call = {"images": picture(), "prompts": TEXT, **options}
    with pytest.raises(error, match=message):
        encoder.word_tokens(**call)
    with pytest.raises(PromptError, match="pass texts"):
        encoder.word_tokens(picture(), encoder.backbone.embed([TEXT], size=(64, 64)))


@pytest.fixture(scope="module")
def nouns():
    """Objects of scenes of three different shapes, and the words of a question about each."""
    encoder = DiffusionEncoder.from_pretrained("shapes")
    scenes, parts = [], []
    for scene in sample_scenes(100_000, seed=970_000):
        if len({thing.shape for thing in scene.objects}) == 3:
            scenes.append(scene)
        if len(scenes) == 96:
            break
    rng = random.Random(0)
    objects = [rng.choice(scene.objects) for scene in scenes]
    for start in range(0, len(scenes), 48):
        questions = [f"what color is the {thing.shape}?" for thing in objects[start : start + 48]]
        pictures = [render(scene) for scene in scenes[start : start + 48]]
        parts.append(encoder.word_tokens(pictures, questions, count=1))
    return objects, parts


@pytest.mark.long
def test_the_word_that_tells_most_is_the_noun_and_its_place_is_its_object(nouns):
    objects, parts = nouns
    chosen = [words[0] for part in parts for words in part.words]
    right = [word == thing.shape for word, thing in zip(chosen, objects, strict=True)]
    assert sum(right) >= 0.9 * len(objects)
    centres = torch.cat([part.places[:, 0, :2] for part in parts])
    truth = torch.tensor([[thing.y, thing.x] for thing in objects])
    assert (centres - truth).norm(dim=1)[right].mean() < 0.05


def named(vectors, colors) -> float:
    """Share of colours that a linear layer by least squares names, of those it was not fit to."""
    known = sorted(set(colors))
    labels = torch.tensor([known.index(color) for color in colors])
    fit = 2 * len(labels) // 3
    scaled = (vectors - vectors[:fit].mean(dim=0)) / (vectors[:fit].std(dim=0) + 1e-6)
    scaled = torch.cat([scaled, torch.ones(len(scaled), 1)], dim=1)
    a = scaled[:fit]
    targets = torch.nn.functional.one_hot(labels[:fit]).float()
    layer = torch.linalg.solve(a.T @ a + 30 * torch.eye(a.shape[1]), a.T @ targets)
    return float(((scaled[fit:] @ layer).argmax(dim=1) == labels[fit:]).float().mean())


@pytest.mark.long
def test_the_token_of_a_noun_names_its_colour_where_the_mean_of_all_cells_does_not(nouns):
    objects, parts = nouns
    colors = [thing.color for thing in objects]
    words = named(torch.cat([part.tokens[:, 0] for part in parts]), colors)
    means = named(torch.cat([part.features.tokens(1)[:, 0] for part in parts]), colors)
    assert words >= means + 0.2
