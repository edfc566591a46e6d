"""Gradients through taps: with and without checkpointing, early exit, to pixels and to text."""

import pytest
import torch

from diffenc import DiffusionEncoder
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.passes.forward import read_taps
from loaded import fresh

TAPS = ("mid_block", "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q", "up_blocks.1")
KINDS = ["tiny_sd_folder", "tiny_sdxl_folder"]


@pytest.fixture(params=KINDS)
def backbone(request):
    return fresh(request.getfixturevalue(request.param))


def gradients(backbone, *, taps=TAPS) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of a sum over the taps, to every parameter before them and to the latents."""
    backbone.unet.requires_grad_(True)
    latents = torch.linspace(-1, 1, 2 * 4 * 9 * 8).reshape(2, 4, 9, 8).requires_grad_()
    embeds = backbone.embed(["red", "blue circle"], size=(72, 64))
    maps = read_taps(backbone, latents, torch.tensor([50, 261]), embeds, taps)
    sum(features.square().sum() for features in maps.values()).backward()
    found = {
        name: parameter.grad.clone()
        for name, parameter in backbone.unet.named_parameters()
        if parameter.grad is not None
    }
    backbone.unet.zero_grad(set_to_none=True)
    return found, latents.grad


@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_changes_no_gradient(backbone, training):
    backbone.unet.train(training)  # some versions of diffusers checkpoint in training mode alone
    expected, to_latents = gradients(backbone)
    assert "down_blocks.1.resnets.0.conv1.weight" in expected
    assert not any(name.startswith("conv_out") for name in expected)
    backbone.unet.enable_gradient_checkpointing()
    assert backbone.unet.is_gradient_checkpointing
    found, again = gradients(backbone)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-6)
        assert (found[name] - gradient).abs().max() <= 1e-5 * scale, name
    torch.testing.assert_close(again, to_latents, atol=1e-5, rtol=1e-5)


def test_checkpointing_really_computes_again(backbone):
    """Otherwise the test above compares a thing with itself."""
    backbone.unet.train().requires_grad_(True)
    calls = []
    block = backbone.unet.down_blocks[1].resnets[0].conv1
    block.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing, expected in ((False, 1), (True, 2)):
        calls.clear()
        if checkpointing:
            backbone.unet.enable_gradient_checkpointing()
        gradients(backbone)
        assert len(calls) == expected
        assert not torch.is_inference_mode_enabled()


def test_nothing_of_a_checkpointed_pass_stays_behind(backbone):
    """The pass ends by an exception inside a checkpoint; tensors saved later are not its own."""
    backbone.unet.train()
    backbone.unet.enable_gradient_checkpointing()
    gradients(backbone)
    assert sum(len(m._forward_hooks) for m in backbone.unet.modules()) == 0
    weight = torch.ones(3, requires_grad=True)
    (weight * weight.exp()).sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((3,), 2 * torch.e))


def test_latents_get_a_gradient_and_no_graph_is_built_otherwise(backbone):
    latents = torch.zeros(1, 4, 8, 8)
    embeds = backbone.embed(["red"], size=(64, 64))
    step = torch.tensor([50])
    assert not read_taps(backbone, latents, step, embeds, TAPS)["mid_block"].requires_grad
    latents.requires_grad_()
    maps = read_taps(backbone, latents, step, embeds, TAPS)
    maps["mid_block"].sum().backward()
    assert latents.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())
    with torch.no_grad():
        assert not read_taps(backbone, latents, step, embeds, TAPS)["mid_block"].requires_grad


def test_texts_get_gradients_from_embeddings_and_from_a_trained_encoder(backbone):
    encoder = DiffusionEncoder.from_pretrained(backbone, taps=("mid_block",), size=64)
    image = torch.zeros(3, 64, 64)
    embeds = backbone.embed(["red"], size=(64, 64))
    states = embeds.prompt_embeds.clone().requires_grad_()
    given = PromptEmbeds(states, embeds.pooled_prompt_embeds, embeds.time_ids, embeds.truncated)
    encoder(image, given).sum().backward()
    assert states.grad.abs().sum() > 0
    text_encoder = backbone.text_encoder.requires_grad_(True)
    encoder(image, "red").sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in text_encoder.parameters())
    assert all(parameter.grad is None for parameter in backbone.unet.parameters())
    text_encoder.requires_grad_(False)
    assert not encoder(image, "red").requires_grad
