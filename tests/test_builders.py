"""The stand-ins are what the tests take them for."""

import json
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

import builders

FOLDERS = {
    "tiny_sd_folder": StableDiffusionPipeline,
    "tiny_sd21_base_folder": StableDiffusionPipeline,
    "tiny_sd21_folder": StableDiffusionPipeline,
    "tiny_sdxl_folder": StableDiffusionXLPipeline,
}


@pytest.fixture(params=FOLDERS, ids=str)
def folder_and_class(request: pytest.FixtureRequest) -> tuple[Path, type[DiffusionPipeline]]:
    return request.getfixturevalue(request.param), FOLDERS[request.param]


def test_diffusers_itself_generates_from_every_folder(folder_and_class):
    folder, pipeline_class = folder_and_class
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        "a red square",
        height=64,
        width=96,
        num_inference_steps=2,
        generator=generator,
        output_type="np",
    ).images
    assert type(pipeline) is pipeline_class
    assert images.shape == (1, 64, 96, 3)


def test_every_folder_is_small(folder_and_class):
    folder, _ = folder_and_class
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 5e6


def test_the_same_weights_every_time(tiny_sd_folder, tmp_path):
    torch.manual_seed(time.time_ns())
    before = torch.get_rng_state()
    again = builders.save_sd(tmp_path, "sd1.5")
    assert torch.equal(before, torch.get_rng_state())
    for path in sorted(tiny_sd_folder.rglob("*.safetensors")):
        assert path.read_bytes() == (again / path.relative_to(tiny_sd_folder)).read_bytes()


def test_variants_of_sd_differ_where_the_real_ones_do(
    tiny_sd_folder, tiny_sd21_base_folder, tiny_sd21_folder
):
    sd, base, full = (
        [
            json.loads((folder / name).read_text())
            for name in ("unet/config.json", "scheduler/scheduler_config.json")
        ]
        for folder in (tiny_sd_folder, tiny_sd21_base_folder, tiny_sd21_folder)
    )
    assert [sd[0]["use_linear_projection"], base[0]["use_linear_projection"]] == [False, True]
    assert [sd[0]["attention_head_dim"], base[0]["attention_head_dim"]] == [4, [1, 2, 4, 4]]
    assert [base[1]["prediction_type"], full[1]["prediction_type"]] == ["epsilon", "v_prediction"]


def test_the_tokenizer_keeps_its_words_and_spells_others(tiny_tokenizer):
    assert tiny_tokenizer.tokenize(" ".join(builders.WORDS)) == [f"{w}</w>" for w in builders.WORDS]
    assert tiny_tokenizer.tokenize("A dog") == ["a</w>", "d", "o", "g</w>"]
    padded = tiny_tokenizer("a red", padding="max_length").input_ids
    assert len(padded) == 77
    assert padded[0] == tiny_tokenizer.bos_token_id
    assert set(padded[3:]) == {tiny_tokenizer.eos_token_id}


def test_the_tiny_components_fit_together(tiny_unet, tiny_vae, tiny_text_encoder, tiny_tokenizer):
    pixel_values = torch.zeros(1, 3, 16, 24)
    latents = tiny_vae.encode(pixel_values).latent_dist.mode()
    tokens = tiny_tokenizer("a red square", padding="max_length", return_tensors="pt")
    prompt_embeds = tiny_text_encoder(tokens.input_ids).last_hidden_state
    noise_pred = tiny_unet(latents, 10, prompt_embeds).sample
    assert noise_pred.shape == (1, 4, 8, 12)
