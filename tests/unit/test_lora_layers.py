"""Adapters on any layer that moves the features; those that move nothing are refused."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model

from diffenc import DiffusionEncoder
from diffenc.denoiser.lora import lora_parameters, save_lora
from diffenc.errors import BackboneError
from diffenc.models.reached_layers import reached_layers
from loaded import fresh, shared

IMAGE = torch.linspace(-1, 1, 3 * 64 * 72).reshape(3, 64, 72)
TAPS = ("mid_block", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q")
BLOCK = "up_blocks.1.attentions.0.transformer_blocks.0"
MOVING = {
    "self-attention": [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        f"{BLOCK}.attn1.to_v",
    ],
    "feed-forward": ["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"],
    "projections": ["mid_block.attentions.0.proj_in", "up_blocks.1.attentions.0.proj_in"],
    "convolutions": ["conv_in", "up_blocks.1.resnets.0.conv1", "down_blocks.1.downsamplers.0.conv"],
    "time": ["time_embedding.linear_1", "mid_block.resnets.0.time_emb_proj"],
    "cross-attention": ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"],
}
STILL = {
    "a later block": ["up_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q"],
    "behind the query": [f"{BLOCK}.attn2.to_k"],
    "later in the block": [f"{BLOCK}.ff.net.2"],
    "the end": ["conv_out"],
    "one of two": ["mid_block.attentions.0.proj_in", "up_blocks.3.resnets.0.conv2"],
}


def load(folder, **options):
    return DiffusionEncoder.from_pretrained(fresh(folder), taps=TAPS, size=(64, 72), **options)


def adapter_for(folder, targets, target):
    """A trained adapter as peft saves it, made without diffenc."""
    unet = copy.deepcopy(shared(folder).unet)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(targets))
    inject_adapter_in_model(config, unet, adapter_name="default")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in lora_parameters(unet, "default").values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    save_lora(unet, target)
    (target / "diffenc.json").unlink()
    return target


@pytest.mark.long
@pytest.mark.parametrize("kind", MOVING)
def test_adapters_that_move_the_features_are_taken(tiny_sd_folder, tmp_path, kind):
    folder = adapter_for(tiny_sd_folder, MOVING[kind], tmp_path / "adapter")
    encoder = load(tiny_sd_folder)
    plain = encoder(IMAGE, "red")
    encoder.load_lora(folder, trainable=True)
    moved = encoder(IMAGE, "red")
    assert (moved - plain).abs().max() > 1e-3
    encoder(IMAGE, "red").square().mean().backward()
    trained = list(encoder.trainable_parameters())
    assert len(trained) == 2 * len(MOVING[kind])
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    encoder.merge_lora()
    torch.testing.assert_close(encoder(IMAGE, "red"), moved, atol=1e-4, rtol=1e-4)
    encoder.save_pretrained(tmp_path / "merged")
    again = DiffusionEncoder.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(IMAGE, "red"), moved, atol=1e-4, rtol=1e-4)
    encoder.unmerge_lora()
    encoder.set_lora(None)
    torch.testing.assert_close(encoder(IMAGE, "red"), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["self-attention", "convolutions"])
def test_peft_agrees_about_what_an_adapter_does(tiny_sd_folder, tmp_path, kind):
    folder = adapter_for(tiny_sd_folder, MOVING[kind], tmp_path / "adapter")
    encoder = load(tiny_sd_folder)
    encoder.load_lora(folder)
    other = load(tiny_sd_folder)
    PeftModel.from_pretrained(other.backbone.unet, str(folder)).eval()
    other.clear_cache()
    torch.testing.assert_close(encoder(IMAGE, "red"), other(IMAGE, "red"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", STILL)
def test_adapters_that_move_nothing_are_refused_and_it_is_true(tiny_sd_folder, tmp_path, kind):
    folder = adapter_for(tiny_sd_folder, STILL[kind], tmp_path / "adapter")
    encoder = load(tiny_sd_folder)
    plain = encoder(IMAGE, "red")
    still = STILL[kind][-1]
    with pytest.raises(BackboneError, match=rf"{still} has no effect on the features"):
        encoder.load_lora(folder)
    assert encoder.lora_names == ()
    with torch.no_grad():  # changed by force, the layer changes nothing
        encoder.backbone.unet.get_submodule(still).weight.add_(1.0)
    encoder.clear_cache()
    assert torch.equal(encoder(IMAGE, "red"), plain)


@pytest.mark.long
def test_reach_is_what_a_gradient_finds_in_the_real_model(tiny_sd_folder):
    encoder = load(tiny_sd_folder)
    unet = encoder.backbone.unet.requires_grad_(True)
    encoder(IMAGE, "red").sum().backward()
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    expected = {
        path
        for path, layer in unet.named_modules()
        if isinstance(layer, kinds) and layer.weight.grad is not None
    }
    assert reached_layers(dict(unet.config), TAPS) == expected


@pytest.mark.long
def test_what_is_no_such_layer_or_of_another_shape_is_refused(tiny_sd_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = adapter_for(tiny_sd_folder, MOVING["convolutions"], tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    path = next(key for key in state if "conv_in.lora_B" in key)
    save_file({**state, path: state[path][:, :, 0, 0].contiguous()}, file)
    encoder = load(tiny_sd_folder)
    with pytest.raises(BackboneError, match=r"lora_B of conv_in must be \(8, 2, 1, 1\)"):
        encoder.load_lora(folder)
    renamed = {key.replace("conv_in", "conv_norm_out"): value for key, value in state.items()}
    save_file(renamed, file)
    with pytest.raises(BackboneError, match="no linear layer or convolution 'conv_norm_out'"):
        encoder.load_lora(folder)
    assert encoder.lora_names == ()
