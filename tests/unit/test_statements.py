"""What a file of weights says of its model is honoured, or refused in a sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from diffenc import DiffusionEncoder, load_backbone
from diffenc.errors import BackboneError, ConfigError
from diffenc.models import describe
from diffenc.models.schedules import make_scheduler
from diffenc.models.statements import Statements

PREFIX = "model.diffusion_model."
EMPTY = torch.zeros(0)
WIDTHS = {"sd1.5": (768, False), "sd2.1": (1024, False), "sdxl": (2048, True)}


def header(path, kind, *markers, channels=4, **metadata):
    """A file whose shapes are those of a real model, with hardly any weights."""
    width, label = WIDTHS.get(kind, kind)
    state = {
        f"{PREFIX}input_blocks.0.0.weight": torch.zeros(320, channels, 3, 3),
        f"{PREFIX}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, width),
        **dict.fromkeys(markers, EMPTY),
    }
    if label:
        state[f"{PREFIX}label_emb.0.0.weight"] = torch.zeros(8, 8)
    save_file({key: value.clone() for key, value in state.items()}, path, metadata=metadata or None)
    return path


def spec(**values):
    return {key.replace("__", "."): value for key, value in values.items()}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def scheduler_of(path, **options):
    return make_scheduler(describe(path, **options).configs["scheduler"])


@pytest.mark.parametrize("kind", ["sd1.5", "sdxl"])
def test_without_a_word_a_model_predicts_noise(file, kind):
    scheduler = scheduler_of(header(file, kind))
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.alphas_cumprod[-1] > 0


@pytest.mark.parametrize("kind", ["sd1.5", "sd2.1", "sdxl"])
@pytest.mark.parametrize(
    ("markers", "metadata"),
    [
        (["v_pred"], {}),
        ([], spec(modelspec__prediction_type="v")),
        ([], spec(modelspec__prediction_type="V_Prediction")),
        ([], {"ss_v_parameterization": "True"}),
        (["v_pred"], spec(modelspec__prediction_type="v", ss_v_parameterization="true")),
    ],
    ids=str,
)
def test_models_that_say_so_predict_v(file, kind, markers, metadata):
    scheduler = scheduler_of(header(file, kind, *markers, **metadata))
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] > 0


@pytest.mark.parametrize("said", [["ztsnr"], {"ss_zero_terminal_snr": "True"}], ids=str)
def test_models_that_say_so_end_in_noise_alone(file, said):
    markers, metadata = (said, {}) if isinstance(said, list) else ([], said)
    scheduler = scheduler_of(header(file, "sdxl", "v_pred", *markers, **metadata))
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("marker", "model"),
    [
        ("edm_mean", "Playground 2.5"),
        ("edm_std", "Playground 2.5"),
        ("edm_vpred.sigma_max", "CosXL"),
        ("edm_vpred.sigma_min", "CosXL"),
    ],
)
def test_models_of_continuous_noise_are_refused_by_name(file, marker, model):
    header(file, "sdxl", marker)
    for options in ({}, {"architecture": "sdxl"}, {"prediction_type": "v_prediction"}):
        with pytest.raises(BackboneError, match=rf"{model}.*{marker}.*EDM"):
            describe(file, **options)
    with pytest.raises(BackboneError, match=model):
        describe("sdxl", unet=file)


@pytest.mark.parametrize(
    ("markers", "metadata", "said"),
    [
        (["v_pred"], spec(modelspec__prediction_type="epsilon"), "'v_pred'.*modelspec"),
        (["v_pred"], {"ss_v_parameterization": "False"}, "ss_v_parameterization"),
        ([], spec(modelspec__prediction_type="rectified_flow"), "'rectified_flow'"),
    ],
    ids=str,
)
def test_a_file_that_contradicts_itself_asks_which_holds(file, markers, metadata, said):
    header(file, "sdxl", *markers, **metadata)
    with pytest.raises(ConfigError, match=rf"{said}.*prediction_type="):
        describe(file)
    for stated in ("epsilon", "v_prediction"):
        assert scheduler_of(file, prediction_type=stated).config.prediction_type == stated


def test_zero_snr_said_and_denied_is_a_contradiction(file):
    with pytest.raises(ConfigError, match=r"'ztsnr'.*ss_zero_terminal_snr"):
        describe(header(file, "sdxl", "ztsnr", ss_zero_terminal_snr="False"))


@pytest.mark.parametrize(
    ("metadata", "alias"),
    [
        (spec(modelspec__architecture="stable-diffusion-v2-768-v"), "sd2.1"),
        (spec(modelspec__architecture="stable-diffusion-v2-512"), "sd2.1-base"),
        ({"ss_base_model_version": "sd_v2_v"}, "sd2.1"),
        ({"ss_v2": "True", "ss_v_parameterization": "False"}, "sd2.1-base"),
    ],
    ids=str,
)
def test_a_stable_diffusion_2_says_in_many_words_what_it_predicts(file, metadata, alias):
    assert describe(header(file, "sd2.1", **metadata)).configs == describe(alias).configs


def test_the_caller_says_what_a_stable_diffusion_2_predicts(file):
    header(file, "sd2.1")
    assert describe(file, prediction_type="v_prediction").configs == describe("sd2.1").configs
    assert describe(file, prediction_type="epsilon").configs == describe("sd2.1-base").configs


@pytest.mark.parametrize(
    "metadata",
    [
        spec(modelspec__architecture="stable-diffusion-v1"),
        spec(modelspec__architecture="stable-diffusion-xl-v1-refiner"),
        {"ss_base_model_version": "sd_v1"},
        {"ss_v2": "True"},
    ],
    ids=str,
)
def test_a_file_that_calls_itself_another_model_is_believed_by_nobody(file, metadata):
    header(file, "sdxl", **metadata)
    with pytest.raises(ConfigError, match=r"shapes of 'sdxl'.*architecture='sdxl'"):
        describe(file)
    assert describe(file, architecture="sdxl").configs == describe("sdxl").configs


def test_words_that_say_nothing_are_passed_over(file):
    metadata = spec(
        modelspec__architecture="My Merge 3",
        modelspec__prediction_type="",
        ss_v2="None",
        format="pt",
    )
    assert describe(header(file, "sdxl", **metadata)).configs == describe("sdxl").configs
    named = spec(modelspec__architecture="stable-diffusion-xl-v1-base/whole")
    assert describe(header(file, "sdxl", **named)).configs == describe("sdxl").configs


def test_an_architecture_that_was_chosen_may_not_contradict_the_file(file, tmp_path):
    header(file, "sdxl", "v_pred")
    with pytest.raises(ConfigError, match=r"'v_prediction'.*predicts 'epsilon'.*prediction_type="):
        describe(file, architecture="sdxl")
    options = {"architecture": "sdxl", "prediction_type": "v_prediction"}
    assert scheduler_of(file, **options).config.prediction_type == "v_prediction"


def test_the_layer_of_the_text_encoder_is_the_one_that_was_trained_with(file):
    told = describe(header(file, "sd1.5", **spec(modelspec__encoder_layer="2"))).configs
    assert told["text_encoder"]["num_hidden_layers"] == 11
    told = describe(header(file, "sd1.5", **spec(modelspec__encoder_layer="1"))).configs
    assert told == describe("sd1.5").configs
    told = describe(header(file, "sdxl", **spec(modelspec__encoder_layer="2"))).configs
    assert told == describe("sdxl").configs
    for kind, value in (("sd1.5", "13"), ("sd1.5", "two"), ("sdxl", "3"), ("sd1.5", "9" * 5000)):
        with pytest.raises(ConfigError, match=r"modelspec\.encoder_layer.*text_encoder="):
            describe(header(file, kind, **spec(modelspec__encoder_layer=value)))


@pytest.mark.parametrize(
    ("kind", "channels", "said"),
    [
        ("sd1.5", 9, "inpainting"),
        ("sdxl", 8, "InstructPix2Pix"),
        ("sd2.1", 5, "depth"),
        ((1024, True), 7, "upscaler"),
        ((1280, True), 4, "refiner of SDXL"),
        ((1024, True), 4, "unCLIP"),
    ],
    ids=str,
)
def test_variants_are_refused_by_name(file, kind, channels, said):
    with pytest.raises(BackboneError, match=rf"no Stable Diffusion 1\.x.*{said}"):
        describe(header(file, kind, channels=channels))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (f"{PREFIX}joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
    ],
)
def test_transformers_are_refused_by_name(file, key, said):
    save_file({key: EMPTY}, file)
    with pytest.raises(BackboneError, match=said):
        describe(file)


@pytest.mark.long
def test_a_given_u_net_says_what_it_predicts_too(tiny_sd_folder, tmp_path):
    unet = load_backbone(tiny_sd_folder).unet.state_dict()
    path = tmp_path / "unet.safetensors"
    save_file({**unet, "v_pred": EMPTY}, path)
    for given in (path, {**unet, "v_pred": EMPTY}):
        with pytest.raises(ConfigError, match=r"predicts 'v_prediction'.*prediction_type="):
            load_backbone(tiny_sd_folder, unet=given)
        options = {"unet": given, "prediction_type": "v_prediction"}
        assert load_backbone(tiny_sd_folder, **options).prediction_type == "v_prediction"
    save_file({**unet, "ztsnr": EMPTY}, path)
    with pytest.raises(ConfigError, match=r"'ztsnr'.*rescale_betas_zero_snr=false|rescale"):
        load_backbone(with_rescaling(tiny_sd_folder, tmp_path / "denied", False), unet=path)
    silent = load_backbone(with_rescaling(tiny_sd_folder, tmp_path / "silent", None), unet=path)
    assert silent.scheduler.alphas_cumprod[-1] == 0


def with_rescaling(folder, target, value):
    shutil.copytree(folder, target)
    path = target / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    config.pop("rescale_betas_zero_snr", None)
    path.write_text(
        json.dumps(config if value is None else {**config, "rescale_betas_zero_snr": value})
    )
    return target


@pytest.mark.long
def test_what_the_caller_says_is_saved_with_the_encoder(tiny_sd_folder, tmp_path):
    options = {"prediction_type": "v_prediction", "taps": ("mid_block",)}
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, **options)
    assert encoder.backbone.prediction_type == "v_prediction"
    encoder.save_pretrained(tmp_path / "named")
    encoder.save_pretrained(tmp_path / "whole", include_backbone=True)
    for folder in ("named", "whole"):
        again = DiffusionEncoder.from_pretrained(tmp_path / folder)
        assert again.backbone.prediction_type == "v_prediction"
    with pytest.raises(ConfigError, match=r"prediction_type must be one of.*'v'"):
        load_backbone(tiny_sd_folder, prediction_type="v")
    with pytest.raises(ConfigError, match="a Backbone has its parts"):
        load_backbone(encoder.backbone, prediction_type="epsilon")


def test_nothing_is_said_by_other_names():
    statements = Statements.read(["a.v_predictor", "my_ztsnr"], {"note": "v"}, "a file")
    assert statements == Statements("a file")
