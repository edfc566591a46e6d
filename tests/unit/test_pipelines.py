"""A pipeline of diffusers in place of a name: its parts are used, frozen and not copied."""

import pytest
import torch
from diffusers import (
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

from diffenc import CrossAttnScorer, DiffusionEncoder, FusedEncoder, list_taps, load_backbone
from diffenc.errors import BackboneError, ConfigError

IMAGE = torch.linspace(-1, 1, 3 * 64 * 72).reshape(3, 64, 72)
OPTIONS = {"taps": ("mid_block", "up_blocks.1"), "size": (64, 72), "conditioning": "cfg"}
KINDS = {"tiny_sd21_folder": StableDiffusionPipeline, "tiny_sdxl_folder": StableDiffusionXLPipeline}


@pytest.fixture(params=KINDS)
def model(request):
    folder = request.getfixturevalue(request.param)
    return folder, KINDS[request.param].from_pretrained(folder)


@pytest.fixture
def pipeline(tiny_sd_folder):
    return StableDiffusionPipeline.from_pretrained(tiny_sd_folder)


@pytest.mark.long
def test_features_and_scores_are_those_of_its_folder(model):
    folder, pipeline = model
    pipeline.unet.train().requires_grad_(True)
    encoder = DiffusionEncoder.from_pretrained(pipeline, **OPTIONS)
    own = DiffusionEncoder.from_pretrained(folder, **OPTIONS)
    found, expected = (each.extract(IMAGE, "red circle") for each in (encoder, own))
    for tap in expected:
        torch.testing.assert_close(found[tap], expected[tap], atol=1e-4, rtol=1e-4)
    assert encoder.backbone.prediction_type == own.backbone.prediction_type
    assert encoder.backbone.uncond_rule == own.backbone.uncond_rule
    assert encoder.backbone.unet is pipeline.unet
    assert not any(p.requires_grad for p in pipeline.unet.parameters())
    assert not pipeline.unet.training
    scores = [
        CrossAttnScorer.from_pretrained(name, size=64, timesteps=(189,), error_term="mse")
        for name in (pipeline, folder)
    ]
    torch.testing.assert_close(
        *(scorer(IMAGE, ["red", "blue"]) for scorer in scores), atol=1e-4, rtol=1e-4
    )
    assert list_taps(pipeline) == list_taps(folder)


def test_it_stays_where_it_is_unless_it_is_told_to_move(pipeline):
    pipeline.to(torch.bfloat16)
    assert load_backbone(pipeline).dtype == torch.bfloat16
    assert load_backbone(pipeline, dtype="float32", device="cpu").dtype == torch.float32
    assert pipeline.unet.dtype == torch.float32


def test_a_truncated_reading_leaves_the_pipeline_whole(pipeline, tiny_sd_folder):
    options = {**OPTIONS, "truncate": True}
    short = DiffusionEncoder.from_pretrained(pipeline, **options)
    expected = DiffusionEncoder.from_pretrained(tiny_sd_folder, **OPTIONS)
    torch.testing.assert_close(short(IMAGE, "red"), expected(IMAGE, "red"), atol=1e-4, rtol=1e-4)
    assert short.backbone.shortened
    assert len(pipeline.unet.up_blocks) == 4
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("red", num_inference_steps=2, height=64, width=64, output_type="np")
    assert made.images.shape == (1, 64, 64, 3)


def test_what_cannot_be_found_again_is_not_saved_without_it(pipeline, tmp_path):
    encoder = DiffusionEncoder.from_pretrained(pipeline, **OPTIONS)
    with pytest.raises(ConfigError, match=r"StableDiffusionPipeline.*include_backbone=True"):
        encoder.save_pretrained(tmp_path / "named")
    assert not (tmp_path / "named").exists()
    encoder.save_pretrained(tmp_path / "whole", include_backbone=True)
    again = DiffusionEncoder.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(again(IMAGE, "red"), encoder(IMAGE, "red"), atol=1e-4, rtol=1e-4)
    scorer = CrossAttnScorer.from_pretrained(pipeline)
    with pytest.raises(ConfigError, match=r"StableDiffusionPipeline.*own save_pretrained"):
        scorer.save_pretrained(tmp_path / "scorer")


def test_it_stands_in_a_fused_encoder(tiny_sd_folder):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    fused = FusedEncoder("shapes-clip", pipeline, grid=(3, 5))
    assert fused(IMAGE, "red").shape[1] == 15
    assert fused.backbone.vae is pipeline.vae


def test_img2img_and_subclasses_are_what_they_are_made_of(pipeline, tiny_sdxl_folder):
    parts = {**pipeline.components, "requires_safety_checker": False}
    assert load_backbone(StableDiffusionImg2ImgPipeline(**parts)).unet is pipeline.unet
    own = type("OwnPipeline", (StableDiffusionPipeline,), {})(**parts)
    assert load_backbone(own).unet is pipeline.unet
    large = StableDiffusionXLImg2ImgPipeline.from_pretrained(tiny_sdxl_folder)
    assert load_backbone(large).family == "sdxl"


def test_other_pipelines_are_refused_by_their_class(pipeline):
    parts = {**pipeline.components, "requires_safety_checker": False}
    inpainting = StableDiffusionInpaintPipeline(**parts)
    for load in (load_backbone, list_taps, DiffusionEncoder.from_pretrained):
        with pytest.raises(BackboneError, match=r"StableDiffusionInpaintPipeline.*inpainting"):
            load(inpainting)
    with pytest.raises(BackboneError, match="StableDiffusionInpaintPipeline"):
        CrossAttnScorer.from_pretrained(inpainting)


def test_a_refiner_is_refused(tiny_sdxl_folder):
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        tiny_sdxl_folder, requires_aesthetics_score=True
    )
    with pytest.raises(BackboneError, match="refiner of SDXL"):
        load_backbone(refiner)


def test_its_scheduler_counts_and_its_parts_must_be_there(pipeline):
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    backbone = load_backbone(pipeline)
    assert backbone.prediction_type == "v_prediction"
    assert backbone.scheduler.alphas_cumprod[-1] == 0
    scheduler, pipeline.scheduler = pipeline.scheduler, EDMEulerScheduler()
    with pytest.raises(BackboneError, match="EDMEulerScheduler"):
        load_backbone(pipeline)
    pipeline.scheduler = scheduler
    text_encoder, pipeline.text_encoder = pipeline.text_encoder, None
    with pytest.raises(BackboneError, match="lacks text_encoder"):
        load_backbone(pipeline)
    pipeline.text_encoder = text_encoder
    pipeline.unet.to("meta")
    with pytest.raises(BackboneError, match="not in memory"):
        load_backbone(pipeline)


def test_options_that_a_pipeline_does_not_take(pipeline):
    with pytest.raises(ConfigError, match="put unet into the pipeline"):
        load_backbone(pipeline, unet=pipeline.unet)
    with pytest.raises(ConfigError, match="architecture= is for a single file"):
        load_backbone(pipeline, architecture="sd1.5")


def test_a_backbone_is_not_said_to_be_elsewhere(tiny_sd_folder):
    backbone = load_backbone(tiny_sd_folder)
    assert load_backbone(backbone, device="cpu", dtype=torch.float32) is backbone
    with pytest.raises(ConfigError, match=r"is in torch\.float32.*backbone\.to\(dtype\)"):
        DiffusionEncoder.from_pretrained(backbone, dtype=torch.bfloat16)
