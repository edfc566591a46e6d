"""Models that need more than a picture and a text are refused by the field that says so."""

import json
import shutil

import pytest
import torch

from diffenc import DiffusionEncoder, load_backbone
from diffenc.errors import BackboneError
from diffenc.inputs.latents import encode_posterior
from diffenc.models import describe


def changed(folder, target, part, **values):
    """A copy of a model's folder with other values in a part's config; None removes one."""
    shutil.copytree(folder, target)
    name = {"": "model_index.json", "scheduler": "scheduler_config.json"}.get(part, "config.json")
    path = target / part / name
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 1000),
        ("addition_embed_type", "text"),
        ("addition_embed_type", "text_image"),
        ("addition_embed_type", "text_time"),
        ("encoder_hid_dim", 32),
        ("encoder_hid_dim_type", "ip_image_proj"),
        ("time_cond_proj_dim", 256),
        ("attention_type", "gated"),
        ("dual_cross_attention", True),
        ("only_cross_attention", [True, True, False, False]),
        ("conv_in_kernel", 5),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("cross_attention_dim", [8, 16, 16, 16]),
        ("_class_name", "UNetMotionModel"),
    ],
)
def test_a_u_net_that_reads_more_is_refused_by_the_field(tiny_sd_folder, tmp_path, field, value):
    folder = changed(tiny_sd_folder, tmp_path / "model", "unet", **{field: value})
    said = rf"{field}|UNetMotionModel|SimpleCrossAttn"
    with pytest.raises(BackboneError, match=said):
        describe(folder)
    with pytest.raises(BackboneError, match=said):
        load_backbone(folder)


def test_a_u_net_object_is_held_to_the_same(tiny_sd_folder):
    backbone = load_backbone(tiny_sd_folder)
    backbone.unet.register_to_config(time_cond_proj_dim=256)
    with pytest.raises(BackboneError, match=r"time_cond_proj_dim=256.*guidance scale"):
        load_backbone(tiny_sd_folder, unet=backbone.unet)
    parts = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
    with pytest.raises(BackboneError, match="time_cond_proj_dim"):
        type(backbone)(name="mine", **{part: getattr(backbone, part) for part in parts})


@pytest.mark.parametrize(
    ("channels", "said"),
    [(9, "inpainting"), (8, "InstructPix2Pix"), (5, "depth"), (7, "upscaler"), (6, "6")],
)
def test_u_nets_of_further_channels_are_called_what_they_are(
    tiny_sd_folder, tmp_path, channels, said
):
    folder = changed(tiny_sd_folder, tmp_path / "model", "unet", in_channels=channels)
    with pytest.raises(BackboneError, match=said):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"_class_name": "Flux2Pipeline"}, "Flux2Pipeline.*or FLUX.2"),
        ({"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}, "InstructPix2Pix"),
        ({"_class_name": "StableDiffusionUpscalePipeline"}, "upscaler"),
        ({"_class_name": "LatentConsistencyModelPipeline"}, "latent consistency"),
        ({"_class_name": ["StableDiffusionXLPipeline"]}, "code of its own"),
        ({"text_encoder": [None, None], "tokenizer": [None, None]}, "refiner of SDXL"),
        ({"requires_aesthetics_score": True}, "refiner of SDXL"),
        ({"force_zeros_for_empty_prompt": "false"}, "force_zeros_for_empty_prompt must be"),
        ({"force_zeros_for_empty_prompt": 0}, "force_zeros_for_empty_prompt must be"),
        ({"text_encoder_2": ["transformers", "T5EncoderModel"]}, "'T5EncoderModel'"),
        ({"unet": ["diffusers", "Kandinsky3UNet"]}, "'Kandinsky3UNet'"),
        ({"vae": "AutoencoderKL"}, "vae must be a library and a class"),
    ],
    ids=str,
)
def test_folders_of_other_models_are_refused_by_name(tiny_sdxl_folder, tmp_path, values, said):
    folder = changed(tiny_sdxl_folder, tmp_path / "model", "", **values)
    for call in (describe, load_backbone):
        with pytest.raises(BackboneError, match=said):
            call(folder)


MEAN, STD = [-1.6, 2.1, -1.4, 1.3], [8.4, 6.0, 5.3, 7.6]


@pytest.mark.long
def test_means_and_deviations_of_latents_are_read_as_diffusers_reads_them(
    tiny_sdxl_folder, tmp_path
):
    """(latents - mean) * scaling_factor / std, as in diffusers' img2img pipeline of SDXL."""
    values = {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5}
    folder = changed(tiny_sdxl_folder, tmp_path / "model", "vae", **values)
    image = torch.linspace(-1, 1, 3 * 64 * 72).reshape(1, 3, 64, 72)
    backbone = load_backbone(folder)
    raw = backbone.vae.encode(image).latent_dist
    mode, deviation = encode_posterior(backbone.vae, image)
    for channel in range(4):
        expected = (raw.mode()[:, channel] - MEAN[channel]) * 0.5 / STD[channel]
        torch.testing.assert_close(mode[:, channel], expected)
        torch.testing.assert_close(deviation[:, channel], raw.std[:, channel] * 0.5 / STD[channel])
    options = {"taps": ("latents",), "size": (64, 72)}
    encoder = DiffusionEncoder.from_pretrained(folder, **options)
    torch.testing.assert_close(encoder.extract(image)["latents"], mode, atol=1e-5, rtol=1e-5)
    encoder.save_pretrained(tmp_path / "saved", include_backbone=True)
    again = DiffusionEncoder.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.extract(image)["latents"], mode, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scaling_factor": None}, "scaling_factor=None"),
        ({"scaling_factor": 0}, "scaling_factor must be positive"),
        ({"scaling_factor": "0.18"}, "scaling_factor must be a number"),
        ({"shift_factor": "a"}, "shift_factor must be a number"),
        ({"latents_mean": MEAN}, "lacks latents_std"),
        ({"latents_std": STD}, "lacks latents_mean"),
        ({"latents_mean": MEAN[:3], "latents_std": STD}, "latents_mean.*must hold 4 numbers"),
        ({"latents_mean": MEAN, "latents_std": [1, 1, 0, 1]}, "all must be above 0"),
        ({"latents_mean": MEAN, "latents_std": "1234"}, "latents_std must be a number or a list"),
        ({"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1}, "both shift_factor"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "AsymmetricAutoencoderKL"),
    ],
    ids=str,
)
def test_a_vae_whose_latents_cannot_be_scaled_is_refused(tiny_sd_folder, tmp_path, values, said):
    folder = changed(tiny_sd_folder, tmp_path / "model", "vae", **values)
    with pytest.raises(BackboneError, match=said):
        load_backbone(folder)


def test_a_config_of_which_no_u_net_can_be_built_is_a_sentence(tiny_sd_folder, tmp_path):
    folder = changed(tiny_sd_folder, tmp_path / "model", "unet", block_out_channels=[8, 8])
    with pytest.raises(BackboneError, match="no U-Net can be built by this config"):
        describe(folder).taps()
