"""What runs before a text comes in runs once; `reuse` runs more without it, as hooks by hand do."""

import pytest
import torch
from torch import nn

from diffenc import CrossAttnScorer, DiffusionEncoder
from diffenc.config import EncoderConfig
from diffenc.errors import ConfigError
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.passes import reuse
from loaded import fresh

TAPS = ("up_blocks.0", "up_blocks.1.resnets.1")
OPTIONS = {"taps": TAPS, "size": (72, 40), "draws": 2, "timestep": (20, 300)}


def pictures(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 72, 40, generator=generator) * 2 - 1


@pytest.fixture
def encoder(tiny_sd_folder):
    return DiffusionEncoder.from_pretrained(fresh(tiny_sd_folder), **OPTIONS)


@pytest.fixture
def convolved(monkeypatch):
    """Rows that go through convolutions, by module; hooks on modules would be seen."""
    rows = {}
    forward = nn.Conv2d.forward

    def count(self, values):
        rows[self] = rows.get(self, 0) + len(values)
        return forward(self, values)

    monkeypatch.setattr(nn.Conv2d, "forward", count)
    return rows


def without_sharing(encoder, monkeypatch, ask):
    with monkeypatch.context() as patch:
        patch.setattr(reuse, "text_free_prefix", lambda unet: ())
        encoder.backbone.clear_caches()
        return ask()


def stir_lora(encoder):
    encoder.add_lora(rank=2)
    with torch.no_grad():
        for name, parameter in encoder.backbone.unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    encoder.backbone.unet.requires_grad_(False)


# Exact: the prefix


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_features_are_those_of_passes_that_share_nothing(encoder, monkeypatch, adapted):
    if adapted:
        stir_lora(encoder)

    def ask():
        texts = [["red", "blue"], ["a circle", "red"]]
        return [encoder.extract(pictures(), text, conditioning="concat") for text in texts]

    shared = ask()
    assert encoder.backbone.caches.outputs.hits > 0
    for features, expected in zip(shared, without_sharing(encoder, monkeypatch, ask), strict=True):
        for half in ("uncond", "cond"):
            for tap in TAPS:
                values, others = features.select(half)[tap], expected.select(half)[tap]
                torch.testing.assert_close(values, others, atol=1e-6, rtol=1e-6)


def test_the_prefix_runs_once_per_picture_step_and_draw(encoder, convolved):
    unet = encoder.backbone.unet
    places = 2 * 2 * 2  # pictures, timesteps, draws
    encoder.extract(pictures(), "red", conditioning="cfg")
    assert convolved[unet.conv_in] == convolved[unet.down_blocks[0].resnets[0].conv1] == places
    assert convolved[unet.down_blocks[0].resnets[1].conv1] == 2 * places
    encoder.extract(pictures(), "blue", conditioning="cfg")
    assert convolved[unet.conv_in] == places
    assert convolved[unet.down_blocks[0].resnets[1].conv1] == 3 * places


def test_both_halves_share_the_prefix_where_nothing_is_remembered(tiny_sd_folder, convolved):
    encoder = DiffusionEncoder(fresh(tiny_sd_folder), EncoderConfig(**OPTIONS), use_cache=False)
    for calls in (1, 2):
        encoder.extract(pictures(), "red", conditioning="cfg")
        assert convolved[encoder.backbone.unet.conv_in] == calls * 8
    assert len(encoder.backbone.caches.outputs) == 0


def test_small_batches_share_the_prefix_too(encoder, convolved, tiny_sd_folder):
    whole = encoder.extract(pictures(), "red", conditioning="cfg")
    encoder = DiffusionEncoder.from_pretrained(fresh(tiny_sd_folder), batch_size=3, **OPTIONS)
    convolved.clear()
    parts = encoder.extract(pictures(), "red", conditioning="cfg")
    assert convolved[encoder.backbone.unet.conv_in] == 8
    for tap in TAPS:
        torch.testing.assert_close(parts[tap], whole[tap], atol=1e-5, rtol=1e-5)


def test_a_tap_inside_the_prefix_is_read_of_every_row(tiny_sd_folder, monkeypatch):
    taps = ("conv_in", "down_blocks.0.resnets.0.conv2", "up_blocks.0")
    encoder = DiffusionEncoder.from_pretrained(fresh(tiny_sd_folder), taps=taps, size=(72, 40))

    def ask():
        return encoder.extract(pictures(), "red", conditioning="cfg")

    shared, expected = ask(), without_sharing(encoder, monkeypatch, ask)
    for tap in taps:
        torch.testing.assert_close(shared[tap], expected[tap], atol=1e-6, rtol=1e-6)


def test_word_tokens_share_the_prefix(encoder, monkeypatch):
    def ask():
        return encoder.word_tokens(pictures(), "a red circle", ["red", "circle"])

    shared, expected = ask(), without_sharing(encoder, monkeypatch, ask)
    torch.testing.assert_close(shared.tokens, expected.tokens, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(shared.maps, expected.maps, atol=1e-6, rtol=1e-6)


def test_what_trains_runs_whole_with_the_gradient_it_had(encoder, monkeypatch, convolved):
    encoder.add_lora(rank=2)
    features = encoder.extract(pictures(), "red", conditioning="cfg")
    assert features[TAPS[0]].requires_grad
    assert convolved[encoder.backbone.unet.conv_in] == 16


# Approximate: reuse


def by_hand(backbone, noisy_latents, timestep, text, taps, part):
    """Taps under a text, with outputs of the unconditional pass put in by hooks."""
    unet = backbone.unet
    size = tuple(8 * side for side in noisy_latents.shape[-2:])
    names = ["conv_in", *[f"down_blocks.{i}" for i in range(len(unet.down_blocks))]]
    names += ["mid_block"] if part == "middle" else []
    kept, outputs, handles = {}, {}, []

    def run(embeds):
        unet(noisy_latents, timestep, **embeds.rows(len(noisy_latents)).unet_kwargs())

    for name in names:

        def keep(module, args, output, name=name):
            return kept.setdefault(name, output)

        handles.append(unet.get_submodule(name).register_forward_hook(keep))
    for tap in taps:

        def read(module, args, output, tap=tap):
            outputs[tap] = output[0] if isinstance(output, tuple) else output

        handles.append(unet.get_submodule(tap).register_forward_hook(read))
    with torch.no_grad():
        run(backbone.embed_uncond(None, size=size))
        run(backbone.embed([text], size=size))
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.long
@pytest.mark.parametrize("part", ["down", "middle"])
@pytest.mark.parametrize("folder", ["tiny_sd_folder", "tiny_sdxl_folder"])
def test_reuse_gives_what_hooks_by_hand_give(request, folder, part):
    backbone = fresh(request.getfixturevalue(folder))
    taps = ("up_blocks.1", "up_blocks.1.attentions.0")
    config = EncoderConfig(taps=taps, size=(72, 40), noise=None, timestep=20, reuse=part)
    encoder = DiffusionEncoder(backbone, config)
    features = encoder.extract(pictures(), "a red circle")
    latents = DiffusionEncoder(
        backbone, EncoderConfig(taps=("latents",), size=(72, 40), noise=None)
    ).extract(pictures())["latents"]
    expected = by_hand(backbone, latents, 20, "a red circle", taps, part)
    whole = DiffusionEncoder(backbone, EncoderConfig(taps=taps, size=(72, 40), noise=None,
                             timestep=20)).extract(pictures(), "a red circle")  # fmt: skip
    for tap in taps:
        torch.testing.assert_close(features[tap], expected[tap], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(features[tap], whole[tap], atol=1e-4)


@pytest.fixture
def reusing(tiny_sd_folder):
    return DiffusionEncoder.from_pretrained(fresh(tiny_sd_folder), reuse="down", **OPTIONS)


@pytest.mark.long
def test_answers_do_not_depend_on_what_was_asked_before(reusing, convolved):
    unet = reusing.backbone.unet
    first = reusing.extract(pictures(), "red", conditioning="cfg")
    assert convolved[unet.down_blocks[0].resnets[0].conv1] == 8
    reusing.extract(pictures(), "blue", conditioning="cfg")
    again = reusing.extract(pictures(), "red", conditioning="cfg")
    assert convolved[unet.down_blocks[0].resnets[0].conv1] == 8
    assert convolved[unet.mid_block.resnets[0].conv1] == 8 * 4
    for tap in TAPS:
        torch.testing.assert_close(again[tap], first[tap], atol=1e-6, rtol=1e-6)


@pytest.mark.long
def test_the_unconditional_half_stays_exact(reusing, encoder):
    features = reusing.extract(pictures(), "red", conditioning="concat").select("uncond")
    expected = encoder.extract(pictures(), conditioning="uncond")
    for tap in TAPS:
        torch.testing.assert_close(features[tap], expected[tap], atol=1e-6, rtol=1e-6)


def test_words_gather_under_reuse(reusing):
    assert reusing.word_tokens(pictures(), "a red circle", "circle").mask.all()
    with pytest.raises(ConfigError, match=r"no text reaches 'down_blocks\.1.* where reuse='down'"):
        reusing.word_tokens(pictures(), "a red circle", "circle", layers="down_blocks.1")


@pytest.mark.parametrize(
    ("part", "tap"), [("down", "down_blocks.1"), ("middle", "mid_block"), ("middle", "up_blocks.0")]
)
def test_taps_that_would_not_change_with_the_text_are_refused(tiny_sd_folder, part, tap):
    backbone = fresh(tiny_sd_folder)
    with pytest.raises(ConfigError, match=f"no text reaches '{tap}' where reuse='{part}'"):
        DiffusionEncoder.from_pretrained(backbone, taps=(tap, "up_blocks.1"), reuse=part)


def test_a_middle_tap_is_read_where_only_the_way_down_is_reused(tiny_sd_folder):
    options = {"taps": "mid_block", "reuse": "down", "size": (72, 40)}
    encoder = DiffusionEncoder.from_pretrained(fresh(tiny_sd_folder), **options)
    red, blue = (encoder.extract(pictures(), text)["mid_block"] for text in ("red", "blue"))
    assert not torch.equal(red, blue)


def test_reuse_does_not_train_and_does_not_compile(reusing):
    with pytest.raises(ConfigError, match="leave reuse out or do without compile"):
        reusing.compile()
    reusing.add_lora(rank=2)
    with pytest.raises(ConfigError, match="train without reuse"):
        reusing.extract(pictures(), "red")
    with torch.no_grad():
        assert reusing.extract(pictures(), "red")[TAPS[0]].isfinite().all()


def test_an_offloaded_unet_is_refused(reusing):
    unet = reusing.backbone.unet
    unet.forward = unet.forward  # as offloading does
    with pytest.raises(ConfigError, match="neither offloaded nor compiled in place"):
        reusing.extract(pictures(), "red")


def test_another_word_for_reuse_is_answered():
    with pytest.raises(ConfigError, match=r"reuse must be one of \['down', 'middle'\], got 'up'"):
        EncoderConfig(reuse="up")


# Scores


@pytest.mark.parametrize("remembers", [True, False])
def test_scores_of_many_texts_share_the_prefix(tiny_sd_folder, monkeypatch, convolved, remembers):
    options = {"preset": "discffusion", "size": (72, 40), "timesteps": (200, 700), "batch_size": 8}
    scorer = CrossAttnScorer.from_pretrained(fresh(tiny_sd_folder), use_cache=remembers, **options)
    texts = ["red", "a circle", "a blue square"]
    scores = scorer(pictures(), texts)
    unet = scorer.backbone.unet
    assert convolved[unet.conv_in] == 2 * 2  # pictures, timesteps
    assert convolved[unet.down_blocks[0].resnets[1].conv1] == 2 * 2 * 4  # and no text
    scorer.clear_cache()
    expected = without_sharing(scorer, monkeypatch, lambda: scorer(pictures(), texts))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("part", ["down", "middle"])
def test_scores_with_reuse_read_the_decoder_behind_a_way_down_without_text(
    tiny_sd_folder, convolved, part
):
    """By hand: outputs without a text put in by hooks, queries and keys multiplied here."""
    backbone = fresh(tiny_sd_folder)
    layer = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    options = {"preset": "paper", "size": (72, 40), "timesteps": (200,), "layers": (layer,)}
    scorer = CrossAttnScorer.from_pretrained(backbone, reuse=part, **options)
    texts = ["red", "a blue circle"]
    scores = scorer(pictures(), texts)
    down, middle = backbone.unet.down_blocks[0], backbone.unet.mid_block
    assert convolved[down.resnets[0].conv1] == 2  # pictures
    assert convolved[middle.resnets[0].conv1] == {"down": 2 * 2, "middle": 2}[part]
    latents = DiffusionEncoder(
        backbone, EncoderConfig(taps=("latents",), size=(72, 40), noise=None)
    ).extract(pictures())["latents"]
    noise = shared_noise(latents.shape[1:], seed=0, timestep=200)
    noisy = add_noise(backbone.scheduler, latents, noise, 200)
    attention = backbone.unet.get_submodule(layer)
    for column, text in enumerate(texts):
        taps = (f"{layer}.to_q", f"{layer}.to_k")
        query, key = by_hand(backbone, noisy, 200, text, taps, part).values()
        query, key = (each.unflatten(-1, (attention.heads, -1)) for each in (query, key))
        products = torch.einsum("bnhd,blhd->bhnl", query, key) * attention.scale
        expected = products.logsumexp(dim=-1).mean(dim=(1, 2))
        torch.testing.assert_close(scores[:, column], expected, atol=1e-5, rtol=1e-5)


def test_predicted_noise_is_scored_under_reuse(tiny_sd_folder):
    options = {"preset": "denoising-gap", "size": (72, 40), "timesteps": (200,)}
    scorer = CrossAttnScorer.from_pretrained(fresh(tiny_sd_folder), **options)
    exact, reused = (
        each(pictures(), ["red", "a blue circle"])
        for each in (scorer, scorer.with_options(reuse="down"))
    )
    assert not torch.equal(exact, reused)
    torch.testing.assert_close(exact, reused, atol=0.1, rtol=0)
    again = scorer.with_options(reuse=None)(pictures(), ["red", "a blue circle"])
    torch.testing.assert_close(again, exact, atol=1e-6, rtol=1e-6)


def test_scores_that_reuse_cannot_serve_are_refused(tiny_sd_folder):
    scorer = CrossAttnScorer.from_pretrained(fresh(tiny_sd_folder))
    with pytest.raises(ConfigError, match=r"no text reaches 'down_blocks\..* where reuse='down'"):
        scorer.with_options(reuse="down", layers="all")
    with pytest.raises(ConfigError, match="saves nothing with mode 'shared-query'"):
        scorer.with_options(reuse="down", mode="shared-query")
    with pytest.raises(ConfigError, match=r"reuse must be one of \['down', 'middle'\], got 'up'"):
        scorer.with_options(reuse="up")
