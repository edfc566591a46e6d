"""U-Nets whose attention runs by other code: features, scores and maps work, or say why not."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F

from diffenc import CrossAttnScorer, DiffusionEncoder, load_backbone
from diffenc.errors import ConfigError, TapError

IMAGE = torch.linspace(-1, 1, 3 * 64 * 72).reshape(3, 64, 72)
SELF = "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_k"
CROSS = "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q"
MAPS = {"timesteps": (189,)}


class KeysFirst:
    """Attention that projects keys and values before queries."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = [attn.to_k(states), attn.to_v(states), attn.to_q(hidden_states)]
        key, value, query = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))


class Elsewhere:
    """Attention with weights of its own: the projections of the U-Net are not called."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        return hidden_states


@pytest.fixture
def encoder(tiny_sd_folder):
    return DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=("up_blocks.1",), use_cache=False)


def scorer_of(encoder, **options):
    return CrossAttnScorer(encoder.backbone, use_cache=False, **options).with_options(
        **MAPS, size=64
    )


def reading(encoder, tap):
    return DiffusionEncoder.from_pretrained(encoder.backbone, taps=(tap,), use_cache=False)


def test_the_order_of_the_projections_makes_no_difference(encoder):
    scorer = scorer_of(encoder)
    texts = ["red circle", "blue"]
    scores, maps = (
        scorer(IMAGE, texts),
        torch.from_numpy(scorer.word_maps(IMAGE, "red circle")["red"].array),
    )
    encoder.backbone.unet.set_attn_processor(KeysFirst())
    torch.testing.assert_close(scorer(IMAGE, texts), scores, atol=1e-4, rtol=1e-4)
    found = torch.from_numpy(scorer.word_maps(IMAGE, "red circle")["red"].array)
    torch.testing.assert_close(found, maps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["exact", "shared-query"])
def test_attention_that_passes_the_projections_by_is_named(encoder, mode):
    scorer = scorer_of(encoder).with_options(mode=mode)
    encoder.backbone.unet.set_attn_processor(Elsewhere())
    with pytest.raises(TapError, match=r"\(Elsewhere\) does not call to_q and to_k.*set_default"):
        scorer(IMAGE, "red")
    with pytest.raises(TapError, match="Elsewhere"):
        scorer.word_maps(IMAGE, "red")
    for tap in (SELF, CROSS):
        with pytest.raises(TapError, match=rf"nothing was read at '{tap}'.*another tap"):
            reading(encoder, tap)(IMAGE, "red")
    encoder.backbone.unet.set_attn_processor(AttnProcessor())
    assert scorer(IMAGE, "red").isfinite().all()


def test_fused_projections_give_features_and_say_what_they_do_not_give(encoder):
    unet = encoder.backbone.unet
    expected = encoder(IMAGE, "red")
    unet.fuse_qkv_projections()
    torch.testing.assert_close(encoder(IMAGE, "red"), expected, atol=1e-4, rtol=1e-4)
    assert reading(encoder, CROSS)(IMAGE, "red").isfinite().all()
    with pytest.raises(TapError, match=r"nothing was read at .*unfuse_qkv_projections"):
        reading(encoder, SELF)(IMAGE, "red")
    with pytest.raises(TapError, match="unfuse_qkv_projections"):
        scorer_of(encoder)(IMAGE, "red")
    with pytest.raises(TapError, match="unfuse_qkv_projections"):
        scorer_of(encoder).word_maps(IMAGE, "red")
    unet.unfuse_qkv_projections()
    assert scorer_of(encoder)(IMAGE, "red").isfinite().all()
    assert reading(encoder, SELF)(IMAGE, "red").isfinite().all()


def test_adapters_that_fused_projections_pass_by_are_refused(encoder, tmp_path):
    unet = encoder.backbone.unet
    unet.fuse_qkv_projections()
    with pytest.raises(ConfigError, match="projections of this U-Net are fused"):
        encoder.add_lora(rank=2)
    assert encoder.lora_names == ()
    unet.unfuse_qkv_projections()
    encoder.add_lora(rank=2)
    encoder(IMAGE, "red")
    unet.fuse_qkv_projections()
    with pytest.raises(ConfigError, match="projections of this U-Net are fused"):
        encoder(IMAGE, "red")
    with pytest.raises(ConfigError, match="projections of this U-Net are fused"):
        encoder.merge_lora()
    unet.unfuse_qkv_projections()
    assert encoder(IMAGE, "red").isfinite().all()


def test_an_adapter_for_pictures_that_came_later_is_a_sentence(encoder):
    encoder.backbone.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    for call in (encoder, scorer_of(encoder)):
        with pytest.raises(ConfigError, match=r"ip_image_proj.*unload_ip_adapter"):
            call(IMAGE, "red")


def test_nothing_is_left_behind_when_attention_cannot_be_read(encoder):
    unet = encoder.backbone.unet
    unet.set_attn_processor(Elsewhere())
    with pytest.raises(TapError):
        scorer_of(encoder)(IMAGE, "red")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    assert load_backbone(encoder.backbone) is encoder.backbone
