import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffenc import CrossAttnScorer, ScorerConfig, load_backbone
from diffenc.errors import (
    BackboneError,
    ConfigError,
    ImageError,
    NonFiniteError,
    PromptError,
    ShapeError,
    TapError,
)
from diffenc.scoring.token_masks import token_mask

TEXTS = ["a red circle", "a blue square left of a circle", "red"]
TWO_STEPS = (200, 700)


def picture(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture(scope="module")
def images():
    return [picture(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder):
    return load_backbone(tiny_sd_folder)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl_folder):
    return load_backbone(tiny_sdxl_folder)


def scorer_of(backbone, preset="paper", **options):
    defaults = {"size": 64, "timesteps": TWO_STEPS}
    return CrossAttnScorer.from_pretrained(backbone, preset=preset, **{**defaults, **options})


class Counts:
    """Rows that go through the U-Net, calls of it, pictures in the VAE, texts in the encoder."""

    def __init__(self, backbone, monkeypatch):
        self.rows = self.calls = self.pictures = self.texts = 0

        def counted(module, method, count):
            inner = getattr(module, method)

            def call(*args, **kwargs):
                count(args[0])
                return inner(*args, **kwargs)

            monkeypatch.setattr(module, method, call)

        def rows(sample):
            self.rows += len(sample)
            self.calls += 1

        counted(backbone.unet, "forward", rows)
        counted(
            backbone.vae,
            "encode",
            lambda batch: setattr(self, "pictures", self.pictures + len(batch)),
        )
        counted(
            backbone.text_encoder,
            "forward",
            lambda ids: setattr(self, "texts", self.texts + len(ids)),
        )


@pytest.fixture
def counts(backbone, monkeypatch):
    backbone.clear_caches()
    return Counts(backbone, monkeypatch)


@pytest.mark.parametrize(
    ("preset", "options", "rows", "texts"),
    [
        ("paper", {}, 3 * 3 * 2, 3),
        ("paper", {"draws": 3}, 3 * 3 * 2 * 3, 3),
        ("calibrated", {"calibration": "gray"}, (3 + 1) * 3 * 2, 3),
        ("calibrated", {"calibration": "neutral"}, (3 + 8) * 3 * 2, 3),
        ("paper", {"reference_texts": ("blue",)}, 3 * (3 + 1) * 2, 4),
        ("discffusion", {}, 3 * (3 + 1) * 2, 4),
        ("paper", {"attention": False, "error_term": "mse"}, 3 * 3 * 2, 3),
        ("paper", {"error_term": "mse_gap"}, 3 * (3 + 1) * 2, 4),
        ("paper", {"mode": "shared-query"}, 3 * 2, 4),
        ("calibrated", {"mode": "shared-query", "calibration": "neutral"}, (3 + 8) * 2, 4),
    ],
)
def test_a_call_costs_what_the_docs_say(backbone, counts, images, preset, options, rows, texts):
    scorer = scorer_of(backbone, preset, batch_size=5, **options)
    scorer(images, TEXTS)
    references = {"gray": 1, "neutral": 8}.get(scorer.config.calibration, 0)
    assert counts.rows == rows
    assert counts.calls == -(-rows // 5)
    assert counts.pictures == 3 + references
    assert counts.texts == texts
    scorer(images, TEXTS)
    assert (counts.rows, counts.pictures, counts.texts) == (rows, 3 + references, texts)
    scorer(images, [*TEXTS, "blue circle"])
    per_text = {"exact": (3 + references) * 2 * scorer.config.draws, "shared-query": 0}
    assert counts.rows == rows + per_text[scorer.config.mode]


def test_pairs_cost_their_own_passes(backbone, counts, images):
    scorer = scorer_of(backbone)
    pairs = scorer.score_pairs(images, TEXTS)
    assert counts.rows == 3 * 2
    torch.testing.assert_close(pairs, scorer(images, TEXTS).diagonal(), rtol=0, atol=1e-6)
    assert counts.rows == 9 * 2


def test_duplicates_are_computed_once(backbone, counts, images):
    scorer = scorer_of(backbone)
    doubled = scorer([images[0], images[1], images[0]], ["red", "blue", "red"])
    assert (counts.rows, counts.pictures, counts.texts) == (2 * 2 * 2, 2, 2)
    assert torch.equal(doubled[0], doubled[2])
    assert torch.equal(doubled[:, 0], doubled[:, 2])
    assert not torch.equal(doubled[:, 0], doubled[:, 1])


@pytest.mark.parametrize("mode", ["exact", "shared-query"])
def test_one_text_only_is_scored_as_it_is_among_others(backbone, images, mode):
    scorer = scorer_of(backbone, "calibrated", mode=mode)
    alone = scorer(images, TEXTS[0])
    assert alone.shape == (3, 1)
    torch.testing.assert_close(alone, scorer(images, TEXTS)[:, :1], rtol=1e-5, atol=1e-6)
    assert scorer.score(images, TEXTS[0]).best_texts() == TEXTS[:1] * 3


def test_nothing_is_remembered_on_request(backbone, counts, images):
    scorer = CrossAttnScorer(backbone, ScorerConfig(size=64, timesteps=(500,)), use_cache=False)
    first = scorer(images[:1], TEXTS)
    assert torch.equal(scorer(images[:1], TEXTS), first)
    assert (counts.rows, counts.pictures, counts.texts) == (6, 2, 6)


def test_a_text_costs_no_pass_up_to_the_last_layer(backbone, images, monkeypatch):
    ran = []
    handle = backbone.unet.up_blocks[3].register_forward_hook(lambda *_: ran.append(1))
    try:
        scorer_of(backbone)(images[:1], "red")
        assert not ran  # the last block ends inside
        scorer_of(backbone, layers="mid_block")(images[:1], "red")
        scorer_of(backbone, error_term="mse")(images[:1], "red")
        assert ran
    finally:
        handle.remove()


MODES = ["exact", "shared-query"]


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("calibration", [None, "gray"])
def test_a_score_does_not_depend_on_what_else_is_in_the_call(backbone, images, mode, calibration):
    options = {"mode": mode, "calibration": calibration, "use_cache": False}
    together = scorer_of(backbone, batch_size=4, **options)(images, TEXTS)
    for image, text in itertools.product(range(3), range(3)):
        alone = scorer_of(backbone, batch_size=1, **options)(images[image], TEXTS[text])
        torch.testing.assert_close(together[image, text], alone[0, 0], rtol=0, atol=2e-6)


def test_sdxl_rows_do_not_depend_on_the_call_either(sdxl, images):
    together = scorer_of(sdxl, "discffusion", use_cache=False)(images[:2], TEXTS)
    alone = scorer_of(sdxl, "discffusion", use_cache=False)(images[1], TEXTS[2])
    torch.testing.assert_close(together[1, 2], alone[0, 0], rtol=1e-5, atol=1e-5)


def test_scores_are_float32_on_the_cpu_and_the_generator_is_left_alone(backbone, images):
    state = torch.random.get_rng_state()
    scores = scorer_of(backbone)(images[0], "red")
    assert (scores.shape, scores.dtype, scores.device.type) == ((1, 1), torch.float32, "cpu")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_half_precision_scores_are_near(tiny_sd_folder, backbone, images):
    low = CrossAttnScorer.from_pretrained(
        tiny_sd_folder, preset="paper", dtype=torch.bfloat16, size=64, timesteps=TWO_STEPS
    )
    found = low(images, TEXTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scorer_of(backbone)(images, TEXTS), rtol=2e-2, atol=0)


def test_trials_are_seeds_in_a_row_with_a_sample_deviation(backbone, images):
    scorer = scorer_of(backbone, seed=5)
    scores = scorer.score(images, TEXTS, trials=3)
    assert scores.seeds == (5, 6, 7)
    expected = np.stack([scorer(images, TEXTS, seed=seed).numpy() for seed in (5, 6, 7)])
    np.testing.assert_allclose(scores.trials, expected, rtol=1e-6)
    np.testing.assert_allclose(scores.mean, expected.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(scores.std, expected.std(axis=0, ddof=1), rtol=1e-3)
    assert scores.by_timestep.shape == (3, 3, 3, 2)
    np.testing.assert_allclose(scores.by_timestep.mean(dim=3), expected, rtol=1e-6)
    assert scores.best_texts() == [TEXTS[i] for i in expected.mean(axis=0).argmax(axis=1)]
    assert scores.best_images() == expected.mean(axis=0).argmax(axis=0).tolist()
    assert torch.isnan(scorer.score(images, TEXTS).std).all()


def test_a_timestep_of_several_scores_as_it_does_alone(backbone, images):
    several = scorer_of(backbone).score(images, TEXTS).by_timestep[0]
    for index, timestep in enumerate(TWO_STEPS):
        alone = scorer_of(backbone, timesteps=[timestep])(images, TEXTS)
        torch.testing.assert_close(several[..., index], alone, rtol=0, atol=2e-6)


def test_draws_are_averaged(backbone, images):
    both = scorer_of(backbone, draws=2)(images, TEXTS)
    first = scorer_of(backbone)(images, TEXTS)
    assert not torch.allclose(both, first, rtol=0, atol=1e-6)
    assert scorer_of(backbone, draws=2).score(images, TEXTS).by_timestep.shape == (1, 3, 3, 2)


@pytest.mark.parametrize("mode", MODES)
def test_calibration_subtracts_the_mean_over_references_and_keeps_the_order_of_images(
    backbone, images, mode
):
    references = [picture(seed, (40, 90)) for seed in (7, 8)]
    raw = scorer_of(backbone, mode=mode)
    scorer = scorer_of(backbone, mode=mode)
    scorer.calibrate(references, texts=["a photo"])
    assert scorer.config.calibration == "given"
    assert scorer.config.reference_digest.startswith("2-")
    offsets = raw(references, TEXTS).mean(dim=0)
    of_images = raw(images, "a photo")
    expected = raw(images, TEXTS) - offsets - of_images
    torch.testing.assert_close(scorer(images, TEXTS), expected, rtol=0, atol=1e-5)
    scorer.calibrate(references, texts=[])
    calibrated = scorer(images, TEXTS)
    assert torch.equal(calibrated.argsort(dim=0), raw(images, TEXTS).argsort(dim=0))
    scorer.calibrate(None)
    assert torch.equal(scorer(images, TEXTS), raw(images, TEXTS))


def test_references_on_themselves_score_zero_on_average(backbone, images):
    scorer = scorer_of(backbone)
    scorer.calibrate(images)
    torch.testing.assert_close(scorer(images, TEXTS).mean(dim=0), torch.zeros(3), rtol=0, atol=2e-6)


def test_the_unconditional_half_of_shared_queries_is_exact(backbone, images):
    """Under the empty prompt the queries are those of the unconditional pass."""
    exact, shared = (
        scorer_of(backbone, mode=mode, layers="mid_block")(images, "") for mode in MODES
    )
    torch.testing.assert_close(exact, shared, rtol=0, atol=2e-6)
    both = scorer_of(backbone, mode="shared-query", include_uncond=True)(images, ["red", ""])
    alone = scorer_of(backbone, mode="shared-query")(images, ["red", ""])
    torch.testing.assert_close(both[:, 0], alone.mean(dim=1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("mask", ["none", "no_pad"])
@pytest.mark.parametrize("mode", MODES)
def test_sdxls_zeros_score_log_77_and_the_empty_text_does_not(sdxl, images, mode, mask):
    """The unconditional half is no text, of which every token counts, whatever else is scored."""
    options = {"mode": mode, "token_mask": mask}
    alone = scorer_of(sdxl, **options)(images, ["red", ""])
    both = scorer_of(sdxl, include_uncond=True, **options)(images, ["red", ""])
    zeros = torch.full((3, 2), 77.0).log()
    torch.testing.assert_close(2 * both - alone, zeros, rtol=0, atol=1e-5)
    assert (alone[:, 1] - zeros[:, 1]).abs().min() > 1e-3


def test_shared_queries_do_not_come_from_sdxls_zeros(sdxl, images):
    config = scorer_of(sdxl, mode="shared-query").config
    shared = [
        CrossAttnScorer(sdxl, replace(config, uncond=rule))(images, "red")
        for rule in ("zeros", "empty")
    ]
    assert torch.equal(*shared)


@pytest.mark.parametrize("mode", MODES)
def test_layer_scores_are_what_each_layer_alone_gives(backbone, images, mode):
    scorer = scorer_of(backbone, "calibrated", mode=mode, calibration="gray")
    by_layer = scorer.layer_scores(images, TEXTS)
    assert by_layer.shape == (len(scorer.layers), 3, 3)
    torch.testing.assert_close(by_layer.mean(dim=0), scorer(images, TEXTS), rtol=0, atol=1e-5)
    one = scorer.with_options(layers=scorer.layers[3])
    torch.testing.assert_close(one(images, TEXTS), by_layer[3], rtol=0, atol=1e-5)
    weights = [0.0] * len(scorer.layers)
    weights[3], weights[0] = 3.0, 1.0
    mixed = scorer.with_options(layer_weights=weights)(images, TEXTS)
    expected = (3 * by_layer[3] + by_layer[0]) / 4
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", ["no_pad", "content"])
def test_padding_can_be_left_out(backbone, images, mask):
    scorer = scorer_of(backbone, token_mask=mask, layers="mid_block")
    assert not torch.allclose(
        scorer(images, TEXTS), scorer_of(backbone, layers="mid_block")(images, TEXTS)
    )
    shared = scorer.with_options(mode="shared-query")(images, ["red"])
    assert torch.isfinite(shared).all()
    # Fewer tokens, smaller sums.
    whole, some = (scorer_of(backbone, token_mask=kind)(images, TEXTS) for kind in ("none", mask))
    assert (some < whole).all()


def test_a_text_without_words_is_refused_where_words_count(backbone, images):
    with pytest.raises(PromptError, match="has no words"):
        scorer_of(backbone, token_mask="content")(images, ["red", ""])


def test_the_error_without_the_text_goes_with_a_score_of_words(backbone, images):
    """The empty text is run for its error alone; its attention, of no words, is not pooled."""
    scorer = scorer_of(backbone, token_mask="content", error_term="mse_gap")
    attention = scorer.with_options(error_term=None)(images, TEXTS)
    errors = scorer_of(backbone, attention=False, error_term="mse_gap")(images, TEXTS)
    torch.testing.assert_close(scorer(images, TEXTS), attention + errors, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_screening_scores_the_kept_exactly_and_tells_the_dropped(backbone, counts, images):
    texts = [
        f"{color} {noun}" for color in ("red", "blue") for noun in ("a", "of", "left", "photo")
    ]
    scorer = scorer_of(backbone, "calibrated", timesteps=(100, 400, 700), calibration="gray")
    screened = scorer.score(images, texts, screen=2)
    rows = counts.rows
    assert rows < 4 * 8 * 3
    whole = scorer(images, texts)
    kept = ~screened.dropped
    assert kept.sum(dim=1).tolist() == [2, 2, 2]
    torch.testing.assert_close(screened.mean[kept], whole[kept], rtol=0, atol=2e-6)
    assert (screened.mean[screened.dropped] == -torch.inf).all()
    with pytest.raises(ConfigError, match="saves nothing"):
        scorer.with_options(mode="shared-query").score(images, texts, screen=2)


def test_trials_of_a_screened_call_score_the_same_candidates(backbone, images):
    texts = [f"{color} {noun}" for color in ("red", "blue") for noun in ("a", "of", "left")]
    scorer = scorer_of(backbone, "diffusion-classifier", timesteps=(100, 400, 700))
    first, several = (scorer.score(images, texts, screen=1, trials=count) for count in (1, 4))
    assert torch.equal(first.dropped, several.dropped)
    assert several.dropped.sum(dim=1).tolist() == [4, 4, 4]  # of 6 texts 3, then 2 are left
    kept = ~several.dropped
    whole = scorer.score(images, texts, trials=4)
    torch.testing.assert_close(several.mean[kept], whole.mean[kept], rtol=0, atol=2e-6)
    best = whole.mean.masked_fill(several.dropped, -torch.inf).argmax(dim=1)
    assert several.best_texts() == [texts[index] for index in best.tolist()]
    gone = [index for index in range(len(texts)) if several.dropped[:, index].all()]
    assert gone
    assert [text for text, image in enumerate(several.best_images()) if image is None] == gone


def test_options_that_a_score_does_not_read_are_refused(backbone):
    scorer = scorer_of(backbone, "diffusion-classifier")
    for options in ({"layers": "mid_block"}, {"lse_lambda": 2.0}, {"token_mask": "content"}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))}: read by the attention par"):
            scorer.with_options(**options)
        with pytest.raises(ConfigError, match="take a preset with attention"):
            scorer_of(backbone, "denoising-gap", **options)
        assert scorer.with_options(preset="paper", **options).config.attention
    with pytest.raises(ConfigError, match="query_prompt is read by mode='shared-query' alone"):
        scorer_of(backbone, query_prompt="a photo")
    with pytest.raises(ConfigError, match="part of a score without the text, and this one has non"):
        scorer_of(backbone, "diffusion-classifier", uncond="zeros")
    assert scorer_of(backbone, "discffusion", uncond="zeros").with_options(uncond=None)
    assert scorer_of(backbone, "calibrated").with_options(attention=False, error_term="mse")


def test_cut_texts_are_told(backbone, images):
    long = "red " * 99
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than the 77 tokens"):
        scores = scorer_of(backbone).score(images[0], ["red", long])
    assert scores.truncated == (0, 99 + 2 - 77)


def test_any_shape_of_image_is_scored(backbone):
    tall = [picture(seed, (96, 64)) for seed in range(2)]
    scores = scorer_of(backbone, "calibrated", resize="none", calibration="neutral")(tall, TEXTS)
    assert scores.shape == (2, 3)
    wide = scorer_of(backbone, size=(64, 128), mode="shared-query")(tall, TEXTS)
    assert wide.shape == (2, 3)


@pytest.mark.long
def test_save_and_load_are_the_identity(tiny_sd_folder, images, tmp_path):
    scorer = CrossAttnScorer.from_pretrained(
        tiny_sd_folder, size=64, timesteps=TWO_STEPS, layers="up_blocks.1", mode="shared-query"
    )
    scorer.calibrate(images[1:])
    scorer.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/scorer_config.json").read_text())["mode"] == "shared-query"
    again = CrossAttnScorer.from_pretrained(tmp_path / "saved")
    assert again.config == scorer.config
    assert torch.equal(again(images, TEXTS), scorer(images, TEXTS))
    raw = CrossAttnScorer.from_pretrained(tmp_path / "saved", calibration=None)
    assert not torch.allclose(raw(images, TEXTS), scorer(images, TEXTS))
    (tmp_path / "saved/references.safetensors").unlink()
    with pytest.raises(ConfigError, match="needs the reference images 2-"):
        CrossAttnScorer.from_pretrained(tmp_path / "saved")(images, TEXTS)
    (tmp_path / "saved/scorer_config.json").write_text("{}")
    with pytest.raises(BackboneError, match="is not a config that CrossAttnScorer"):
        CrossAttnScorer.from_pretrained(tmp_path / "saved")


def test_bad_input(backbone, images, tmp_path):
    scorer = scorer_of(backbone)
    with pytest.raises(PromptError, match="got no texts"):
        scorer(images, [])
    with pytest.raises(ShapeError, match="got no images"):
        scorer([], TEXTS)
    with pytest.raises(ImageError, match="no such image file"):
        scorer(tmp_path / "none.png", TEXTS)
    with pytest.raises(ShapeError, match="as many images as texts, got 3 and 2"):
        scorer.score_pairs(images, TEXTS[:2])
    with pytest.raises(ConfigError, match="trials must be an int from 1 to"):
        scorer.score(images, TEXTS, trials=0)
    with pytest.raises(ConfigError, match="not those of layers"):
        scorer_of(backbone, "discffusion").layer_scores(images, TEXTS)
    with pytest.raises(TapError, match=r"no cross-attention in 'up_blocks\.9'"):
        scorer_of(backbone, layers="up_blocks.9")
    with pytest.raises(ConfigError, match="got 2 for 16 layers"):
        scorer_of(backbone, layer_weights=(1.0, 2.0))
    with pytest.raises(ConfigError, match="unknown options"):
        scorer_of(backbone, timestep=5)
    with pytest.raises(ConfigError, match="unknown preset 'dsd'"):
        scorer_of(backbone, "dsd")
    with pytest.raises(ConfigError, match=r"must hold one .* or more"):
        scorer.with_options(timesteps=[])
    with pytest.raises(ConfigError, match=r"must hold one .* or more"):
        scorer.word_maps(images[0], TEXTS[0], timesteps=[])
    with pytest.raises(ConfigError, match=r"call scorer\.calibrate"):
        scorer_of(backbone, calibration="given")(images, TEXTS)


def test_scores_that_are_no_numbers_are_an_error(tiny_sd_folder, images):
    backbone = load_backbone(tiny_sd_folder)
    backbone.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.fill_(torch.nan)
    for mode in MODES:
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            scorer_of(backbone, mode=mode)(images, TEXTS)


def test_word_maps_come_as_heat_maps_of_any_shape(backbone, tmp_path):
    wide = picture(0, (64, 128))
    scorer = scorer_of(backbone, size=(64, 128))
    maps_of_words = scorer.word_maps(wide, "a red circle, red!", layers=["up_blocks"])
    assert list(maps_of_words) == ["a", "red", "circle"]
    assert maps_of_words["red"].array.shape == (8, 16)
    assert maps_of_words["red"].label == "red"
    assert maps_of_words["red"].to_pil(overlay=True).size == (128, 64)
    assert maps_of_words["red"]._repr_png_().startswith(b"\x89PNG")
    daam = scorer.word_maps(wide, "a red circle", "circle", preset="daam", heads=[0])
    assert daam["circle"].array.shape == (8, 16)
    with pytest.raises(PromptError, match="has no words to map"):
        scorer.word_maps(wide, "...")


@pytest.mark.wrong_type
def test_word_maps_are_of_one_image_and_of_a_known_preset(backbone):
    scorer, image = scorer_of(backbone), picture(0)
    with pytest.raises(ShapeError, match="of one image, got 2"):
        scorer.word_maps([image, image], "red")
    with pytest.raises(ConfigError, match="Did you mean 'daam'"):
        scorer.word_maps(image, "red", preset="dam")


def test_layer_weights_chosen_on_items_are_taken_into_the_config(backbone, images):
    scorer = scorer_of(backbone, "calibrated", calibration="gray", mode="shared-query")
    items = [(images[:2], TEXTS[:2]), (images[1:], TEXTS[1:])]
    weights = scorer.fit_layers(items)
    assert scorer.config.layer_weights == weights
    assert len(weights) == len(scorer.layers)
    assert sum(weights) == pytest.approx(1)
    by_layer = scorer.layer_scores(images, TEXTS)
    mixed = torch.einsum("lit,l->it", by_layer, torch.tensor(weights))
    torch.testing.assert_close(scorer(images, TEXTS), mixed, rtol=0, atol=1e-5)
    with pytest.raises(ShapeError, match="must be of one shape"):
        scorer.fit_layers([*items, (images, TEXTS)])
    with pytest.raises(ShapeError, match="of one shape"):
        scorer.fit_layers([])


LONG = "a red circle left of a blue square and " * 12


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_mask": "content", "lse_axis": "pixels"},
        {"space": "probs", "lse_axis": "pixels"},
        {"lse_axis": "both", "token_mask": "no_pad"},
        {"include_uncond": True, "uncond": "empty"},
        {"mode": "shared-query"},
        {"mode": "shared-query", "space": "probs", "lse_axis": "pixels", "token_mask": "content"},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["backbone", "sdxl"])
def test_a_long_text_in_windows_scores_beside_a_short_one_as_it_does_alone(
    model, options, images, request
):
    scorer = scorer_of(request.getfixturevalue(model), long_prompts="chunk", **options)
    scorer.use_cache = False
    together = scorer(images[:2], [LONG, TEXTS[0]])
    alone = torch.cat([scorer(images[:2], [text]) for text in (LONG, TEXTS[0])], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_windows_are_read_to_the_end_and_short_texts_stay_what_they_are(backbone, images):
    chunked = scorer_of(backbone, long_prompts="chunk", token_mask="content")
    cut = chunked.with_options(long_prompts="truncate")
    other_end = LONG + "a blue circle"
    in_windows = chunked(images[:1], [LONG, other_end, TEXTS[0]])
    with pytest.warns(UserWarning, match="longer than"):
        truncated = cut(images[:1], [LONG, other_end, TEXTS[0]])
    assert truncated[0, 0] == truncated[0, 1]  # they differ behind the cut
    assert (in_windows[0, 0] - in_windows[0, 1]).abs() > 1e-4
    torch.testing.assert_close(in_windows[:, 2], truncated[:, 2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "own"), [("no_pad", 2), ("content", 0)])
def test_every_window_counts_its_own_words(backbone, kind, own):
    """Of 80 words 75 stand in the first window, between its start and end tokens."""
    texts = ["red " * 80, "red " * 3]
    embeds = backbone.embed(texts, size=(64, 64), long_prompts="chunk")
    mask = token_mask(backbone, texts, embeds, kind)
    assert mask.shape == (2, 2 * 77)
    assert mask[0, :77].sum() == 75 + own
    assert mask[0, 77:].sum() == 5 + own
    assert mask[1].nonzero().flatten().tolist() == list(range(5) if own else range(1, 4))
    cut = backbone.embed(texts, size=(64, 64))
    assert token_mask(backbone, texts, cut, kind).sum(dim=1).tolist() == [75 + own, 3 + own]
