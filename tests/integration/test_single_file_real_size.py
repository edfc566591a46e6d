"""A single file with names and shapes of the published ones, recognised by itself (`-m slow`)."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import ldm_layout as ldm
from diffenc import load_backbone
from diffenc.models import describe
from diffenc.models.shapes import shapes_folder

pytestmark = pytest.mark.slow


def filled(build, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a model in bfloat16: numbers that tell every place from every other nearby."""
    with torch.device("meta"):
        model: nn.Module = build()
    ramp = (torch.arange(1009) - 504).to(torch.bfloat16) / 20_000
    return {
        name: ramp.roll(seed + place)
        .repeat(value.numel() // 1009 + 1)[: value.numel()]
        .reshape(value.shape)
        for place, (name, value) in enumerate(model.state_dict().items())
    }


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("alias", ["sd1.5", "sd2.1-base"])
def test_a_file_in_the_published_layout_becomes_the_alias_s_model(alias, tmp_path):
    configs = describe(alias).configs
    parts = {
        "unet": filled(lambda: UNet2DConditionModel.from_config(configs["unet"]), 1),
        "vae": filled(lambda: AutoencoderKL.from_config(configs["vae"]), 2),
        "text_encoder": filled(lambda: CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])), 3),
    }
    text = ldm.prefixed(
        "cond_stage_model.transformer.", ldm.clip_in_original_layout(parts["text_encoder"])
    )
    if alias == "sd2.1-base":
        inner = ldm.openclip_in_original_layout(parts["text_encoder"], extra_layer=True)
        text = ldm.prefixed("cond_stage_model.model.", inner)
    state = {
        **ldm.prefixed("model.diffusion_model.", ldm.unet_in_original_layout(parts["unet"])),
        **ldm.prefixed("first_stage_model.", ldm.vae_in_original_layout(parts["vae"])),
        **text,
    }
    file = tmp_path / "model.safetensors"
    save_file(
        {name: value.contiguous() for name, value in state.items()},
        file,
        metadata={"modelspec.prediction_type": "epsilon"},
    )
    tokenizer = shapes_folder() / "tokenizer"
    backbone = load_backbone(file, tokenizer=tokenizer, dtype=torch.bfloat16)
    for name, expected in parts.items():
        found = backbone.parts()[name].state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    assert backbone.default_size == 512
    assert backbone.prediction_type == "epsilon"
    assert backbone.tokenizer.pad_token == ("<|endoftext|>" if alias == "sd1.5" else "!")
