"""Rows without a text skip cross-attention, and get what it would have given them."""

import pytest
import torch

from diffenc import DiffusionEncoder
from diffenc.config import EncoderConfig
from diffenc.denoiser.attention import cross_attentions
from diffenc.passes import forward, reuse
from loaded import fresh

TAPS = ("up_blocks.0", "up_blocks.1.attentions.0")
OPTIONS = {"taps": TAPS, "size": (72, 40), "timestep": (20, 300)}
ATTENTION = "up_blocks.0.attentions.0.transformer_blocks.0.attn2"


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 72, 40, generator=generator) * 2 - 1


@pytest.fixture
def encoder(tiny_sdxl_folder):
    return DiffusionEncoder.from_pretrained(fresh(tiny_sdxl_folder), **OPTIONS)


@pytest.fixture
def attended(monkeypatch):
    """Pairs of cells and tokens that cross-attention compares, per call of it."""
    pairs = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def count(query, key, *args, **options):
        if key.shape[-2] != query.shape[-2] or key.shape[-2] == 1:
            pairs.append(query.shape[0] * query.shape[-2] * key.shape[-2])
        return attend(query, key, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    return pairs


def for_all_rows(encoder, ask):
    """What is asked, with cross-attention under every text."""
    encoder.backbone.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        for module in (forward, reuse):
            patch.setattr(module, "skipping_blank_texts", lambda unet, *_, **__: unet)
        return ask()


def adapt(encoder):
    encoder.add_lora(rank=2, projections=("to_v", "to_out.0"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.backbone.unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    encoder.backbone.unet.requires_grad_(False)


def bias_values(encoder):
    generator = torch.Generator().manual_seed(1)
    for attention in cross_attentions(encoder.backbone.unet).values():
        values = 0.1 * torch.randn(attention.to_v.out_features, generator=generator)
        attention.to_v.bias = torch.nn.Parameter(values)
    encoder.backbone.unet.requires_grad_(False)


@pytest.mark.parametrize("change", [None, adapt, bias_values], ids=["plain", "lora", "biases"])
def test_features_are_those_of_attention_to_every_text(encoder, change):
    if change is not None:
        change(encoder)

    def ask():
        texts = ["red", "a blue circle"]
        return encoder.extract(pictures(), texts, conditioning="concat")

    skipped, expected = ask(), for_all_rows(encoder, ask)
    for half in ("uncond", "cond"):
        for tap in TAPS:
            values, others = skipped.select(half)[tap], expected.select(half)[tap]
            largest = float(others.abs().max())
            torch.testing.assert_close(values, others, atol=1e-6 * largest, rtol=1e-6)


def test_only_rows_with_a_text_compare_cells_and_tokens(encoder, attended):
    with torch.no_grad():
        encoder.extract(pictures(), "red", conditioning="cfg")
    words = [pairs for pairs in attended if pairs > 1]
    assert attended.count(1) == len(words) > 0  # one cell and one token, once a layer
    alone = list(words)
    attended.clear()
    encoder.extract(pictures(), "red", conditioning="cond")
    assert attended == alone
    attended.clear()
    encoder.backbone.clear_caches()
    encoder.extract(pictures(), conditioning="uncond")
    assert set(attended) == {1}


@pytest.mark.long
@pytest.mark.parametrize("part", ["down", "middle"])
def test_the_way_down_without_a_text_skips_too(encoder, attended, part):
    config = EncoderConfig(**OPTIONS, reuse=part)
    reusing = DiffusionEncoder(encoder.backbone, config)

    def ask():
        return reusing.extract(pictures(), "red", conditioning="cfg")

    skipped = ask()
    assert 1 in attended
    for tap, values in for_all_rows(reusing, ask).items():
        torch.testing.assert_close(skipped[tap], values, atol=1e-6, rtol=1e-6)


def test_the_model_is_left_as_it_was(encoder):
    before = dict(encoder.backbone.unet.named_modules())
    encoder.extract(pictures(), "red", conditioning="cfg")
    assert dict(encoder.backbone.unet.named_modules()) == before


def test_attention_that_is_read_or_hooked_runs_for_all_rows(tiny_sdxl_folder, attended):
    backbone = fresh(tiny_sdxl_folder)
    read = {**OPTIONS, "taps": (*TAPS, f"{ATTENTION}.to_q")}
    encoder = DiffusionEncoder(backbone, EncoderConfig(**read))

    def once(encoder):
        attended.clear()
        backbone.clear_caches()
        encoder.extract(pictures(), conditioning="uncond")
        return attended.count(1)

    every = once(DiffusionEncoder(backbone, EncoderConfig(**OPTIONS)))
    assert once(encoder) == every - 1
    rows = []
    hook = backbone.unet.get_submodule(ATTENTION).register_forward_hook(
        lambda _module, _args, output: rows.append(len(output))
    )
    assert once(DiffusionEncoder(backbone, EncoderConfig(**OPTIONS))) == every - 1
    hook.remove()
    assert rows == [4]  # two pictures at two timesteps


def test_what_trains_attends_everywhere(encoder, attended):
    encoder.add_lora(rank=2)
    assert encoder.extract(pictures(), "red", conditioning="cfg")[TAPS[0]].requires_grad
    assert 1 not in attended


def test_an_empty_text_that_was_encoded_is_attended_to(tiny_sdxl_folder, attended):
    config = EncoderConfig(**OPTIONS, uncond="empty")
    DiffusionEncoder(fresh(tiny_sdxl_folder), config).extract(pictures(), conditioning="uncond")
    assert 1 not in attended


def test_processors_of_others_run_for_all_rows(encoder, attended):
    class Own:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
            return hidden_states

    encoder.backbone.unet.set_attn_processor(Own())
    encoder.extract(pictures(), conditioning="uncond")
    assert attended == []
