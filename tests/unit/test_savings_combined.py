"""What is computed once stays exact, bounded and fresh beside everything else that is offered.

Pictures whose latents have odd sides, in float32, at several timesteps. Expected values come from
passes in which nothing is shared or skipped, by a model that remembers nothing.
"""

import copy

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import builders
from diffenc import CrossAttnScorer, DiffusionEncoder
from diffenc.config import EncoderConfig
from diffenc.memory.cache import TensorCache
from diffenc.models import load_backbone
from diffenc.models.base import Caches
from diffenc.passes import forward, reuse
from loaded import fresh
from state_builders import stirred

TAPS = ("up_blocks.0", "up_blocks.1.attentions.0")
OPTIONS = {"taps": TAPS, "size": (72, 40), "timestep": (20, 300, 700)}
KINDS = ["tiny_sd_folder", "tiny_sdxl_folder"]
TEXTS = ["red", "a blue circle"]


def pictures(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, 72, 40, generator=generator) * 2 - 1


def adapted(encoder):
    encoder.add_lora(rank=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.backbone.unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    encoder.backbone.unet.requires_grad_(False)


def captioned(encoder):
    sides = {"hidden_size": 16, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 12}
    config = CLIPVisionConfig(**sides, **layers)
    clip = builders.seeded(lambda: CLIPVisionModelWithProjection(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder.add_captioner(clip)
        with torch.no_grad():  # it begins as nothing
            for parameter in encoder.captioner.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    encoder.captioner.requires_grad_(False)


def both(encoder):
    adapted(encoder)
    captioned(encoder)


CHANGES = {"captioner": captioned, "lora and captioner": both}


@pytest.fixture
def plain(monkeypatch):
    """Call a function while nothing is shared, skipped or remembered."""

    def ask(encoder, call):
        encoder.backbone.clear_caches()
        with monkeypatch.context() as patch:
            patch.setattr(reuse, "text_free_prefix", lambda unet: ())
            for module in (forward, reuse):
                patch.setattr(module, "skipping_blank_texts", lambda unet, *_, **__: unet)
            return call(DiffusionEncoder.extract)

    return ask


def assert_equal(features, expected):
    for half in ("uncond", "cond"):
        for tap in TAPS:
            values, others = features.select(half)[tap], expected.select(half)[tap]
            largest = max(1.0, float(others.abs().max()))
            torch.testing.assert_close(values, others, atol=1e-6 * largest, rtol=1e-6)


def guided(encoder, extract=DiffusionEncoder.extract):
    with torch.no_grad():
        return extract(encoder, pictures(), TEXTS, conditioning="concat")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_savings_are_exact_beside(request, plain, kind, change):
    encoder = DiffusionEncoder(fresh(request.getfixturevalue(kind)), EncoderConfig(**OPTIONS))
    change(encoder)
    first, again = guided(encoder), guided(encoder)
    expected = plain(encoder, lambda extract: guided(encoder, extract))
    assert_equal(first, expected)
    assert_equal(again, expected)


@pytest.mark.long
@pytest.mark.timeout(600)  # dynamo follows every block
@pytest.mark.parametrize("kind", KINDS)
def test_savings_are_exact_beside_compiled_code(request, kind):
    """Compiled code shares and skips nothing; what it gives is what eager code gives with both."""
    backbone = fresh(request.getfixturevalue(kind))
    encoder = DiffusionEncoder(backbone, EncoderConfig(**OPTIONS))
    eager = guided(encoder)
    encoder.compile(backend="eager")
    backbone.clear_caches()
    assert_equal(eager, guided(encoder))
    assert len(backbone.caches.outputs) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_savings_are_exact_in_a_truncated_model(request, plain, kind):
    folder = request.getfixturevalue(kind)
    short = DiffusionEncoder.from_pretrained(folder, truncate=True, **OPTIONS)
    whole = DiffusionEncoder.from_pretrained(load_backbone(folder), **OPTIONS)
    features = guided(short)
    saved = short.backbone.caches.outputs if kind == "tiny_sd_folder" else None
    assert saved is None or saved.misses == 2 * 3  # pictures, timesteps
    assert_equal(features, plain(whole, lambda extract: guided(whole, extract)))


# Scores


@pytest.mark.parametrize("part", [None, "down", "middle"])
@pytest.mark.parametrize("over", ["texts", "images"])
def test_screened_scores_are_those_of_all_pairs(tiny_sd_folder, part, over):
    options = {"preset": "denoising-gap", "size": (72, 40), "timesteps": (100, 300, 700)}
    scorer = CrossAttnScorer.from_pretrained(fresh(tiny_sd_folder), reuse=part, **options)
    texts = ["red", "a blue circle", "green", "a square", "two stars"]
    shown = torch.cat([pictures(), pictures(1)])
    every = scorer(shown, texts)
    scorer.clear_cache()
    screened = scorer.score(shown, texts, screen=2, screen_over=over).trials[0]
    kept = screened.isfinite()
    per_one = kept.sum(dim=1 if over == "texts" else 0)
    assert (per_one == 2).all()
    torch.testing.assert_close(screened[kept], every[kept], atol=1e-5, rtol=1e-5)


def test_a_screened_call_runs_the_way_down_once_per_picture_and_step(tiny_sd_folder, monkeypatch):
    rows = {}
    convolve = torch.nn.Conv2d.forward

    def count(self, values):
        rows[self] = rows.get(self, 0) + len(values)
        return convolve(self, values)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", count)
    options = {"preset": "denoising-gap", "size": (72, 40), "timesteps": (100, 300, 700)}
    scorer = CrossAttnScorer.from_pretrained(fresh(tiny_sd_folder), reuse="down", **options)
    scorer.score(pictures(), ["red", "blue", "green", "yellow"], screen=1)
    unet = scorer.backbone.unet
    assert rows[unet.down_blocks[0].resnets[0].conv1] == 2 * 3  # pictures, timesteps
    # Four texts, then two, then one, and none of a text each time.
    assert rows[unet.mid_block.resnets[0].conv1] == 2 * (5 + 3 + 2)


# Bounds


def test_caches_keep_no_more_than_their_bounds(tiny_sd_folder):
    backbone = fresh(tiny_sd_folder)
    encoder = DiffusionEncoder(backbone, EncoderConfig(**{**OPTIONS, "timestep": (20, 300)}))
    encoder.extract(pictures()[:1], "red", conditioning="cfg")
    names = ("latents", "prompts", "features", "outputs")
    room = {name: 3 * getattr(backbone.caches, name).nbytes for name in names}
    assert all(room.values())
    caches = Caches(**{name: TensorCache(room[name]) for name in names})
    backbone.caches = caches
    for seed in range(3):
        for text in ("red", "blue", "green"):
            encoder.extract(pictures(seed), text, conditioning="cfg")
            for name in names:
                cache = getattr(caches, name)
                assert 0 < cache.nbytes <= cache.max_bytes == room[name]
    # Of six pictures at two timesteps half of the outputs stay, and each was computed once.
    assert (len(caches.outputs), caches.outputs.misses) == (3 * 2, 6 * 2)
    assert (len(caches.latents), caches.latents.misses) == (3, 6)


# Whatever changes between two calls


def edited_weights(encoder):
    with torch.no_grad():
        encoder.backbone.unet.down_blocks[0].resnets[0].conv1.weight.mul_(1.5)


def edited_text_encoder(encoder):
    with torch.no_grad():
        encoder.backbone.text_encoder.get_input_embeddings().weight.mul_(1.5)


def other_dtype_and_back(encoder):
    encoder.backbone.unet.to(torch.bfloat16).to(torch.float32)


def other_schedule(encoder):
    levels = encoder.backbone.scheduler.alphas_cumprod
    encoder.backbone.scheduler.alphas_cumprod = levels.square()


def merged(encoder):
    adapted(encoder)
    encoder.merge_lora()


def merged_and_left_out(encoder):
    merged(encoder)
    encoder.unmerge_lora()
    encoder.set_lora(None)
    edited_weights(encoder)


def another_unet(encoder):
    encoder.backbone.unet = stirred(encoder.backbone.unet)


EDITS = [
    edited_weights,
    edited_text_encoder,
    other_dtype_and_back,
    other_schedule,
    adapted,
    merged,
    merged_and_left_out,
    captioned,
    another_unet,
]


@pytest.mark.long
@pytest.mark.parametrize("part", [None, "down", "middle"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_outputs_that_are_reused_are_never_those_of_another_model(tiny_sd_folder, edit, part):
    config = EncoderConfig(**{**OPTIONS, "taps": TAPS[1:], "timestep": 300}, reuse=part)
    encoder = DiffusionEncoder(fresh(tiny_sd_folder), config)
    with torch.no_grad():
        before = encoder.extract(pictures(), TEXTS)
        edit(encoder)
        after = encoder.extract(pictures(), TEXTS)
        twin = copy.deepcopy(encoder)
        twin.use_cache = False
        expected = twin.extract(pictures(), TEXTS)
    tap = TAPS[1]
    torch.testing.assert_close(after[tap], expected[tap], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[tap], expected[tap], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", [None, "down", "middle"])
def test_a_picture_that_is_edited_in_place_is_another_one(tiny_sd_folder, part):
    config = EncoderConfig(**{**OPTIONS, "taps": TAPS[1:], "timestep": 300}, reuse=part)
    encoder = DiffusionEncoder(fresh(tiny_sd_folder), config)
    shown = pictures()
    before = encoder.extract(shown, TEXTS)[TAPS[1]]
    shown[0, :, 10:20] = 1.0
    after = encoder.extract(shown, TEXTS)[TAPS[1]]
    expected = DiffusionEncoder(encoder.backbone, config, use_cache=False).extract(shown, TEXTS)
    # The edited picture is read alone, which rounds otherwise than beside another one.
    off = (after - expected[TAPS[1]]).norm() / expected[TAPS[1]].norm()
    assert off < 1e-6
    assert not torch.allclose(after[0], before[0], atol=1e-4)
    torch.testing.assert_close(after[1], before[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("part", [None, "down"])
@pytest.mark.parametrize(
    "other",
    [{"timestep": 301}, {"seed": 1}, {"noise": None}, {"posterior": "sample"}, {"draws": 2}],
    ids=str,
)
def test_options_that_change_the_noise_share_nothing(tiny_sd_folder, part, other):
    backbone = fresh(tiny_sd_folder)
    options = {**OPTIONS, "taps": TAPS[1:], "timestep": 300, "reuse": part}
    DiffusionEncoder(backbone, EncoderConfig(**options)).extract(pictures(), TEXTS)
    changed = EncoderConfig(**{**options, **other})
    after = DiffusionEncoder(backbone, changed).extract(pictures(), TEXTS)[TAPS[1]]
    plain = DiffusionEncoder(backbone, changed, use_cache=False)
    expected = plain.extract(pictures(), TEXTS)[TAPS[1]]
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-6)
