"""What cannot be right is answered before it costs anything, and says what to do."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from diffenc import DiffusionEncoder, EncoderConfig, load_backbone
from diffenc.errors import ConfigError, ImageError, PromptError, ShapeError
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.models import device as devices
from marks import wrong_type

TAPS = ("mid_block",)
IMAGE = Image.new("RGB", (64, 64), "red")


@pytest.fixture(scope="module")
def encoder(tiny_sd_folder):
    return DiffusionEncoder.from_pretrained(tiny_sd_folder, taps=TAPS)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl_folder):
    return DiffusionEncoder.from_pretrained(tiny_sdxl_folder, taps=TAPS, size=64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64], ids=str)
def test_other_dtypes_are_refused_before_loading(dtype):
    with pytest.raises(ConfigError, match=r"dtype must be one of .*bfloat16.*got torch\."):
        load_backbone("sd1.5", dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:9", "tpu", "gpu"])
def test_a_missing_device_is_named_before_loading(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    others = r".*has on this machine: cpu, cuda:0, cuda:1"
    with pytest.raises(ConfigError, match=f"cannot use device '{device}'{others}"):
        load_backbone("sd1.5", device=device)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.float16, r"float32 or torch\.bfloat16"), (torch.bfloat16, r"float32\.")],
)
def test_half_precision_that_the_device_lacks_is_refused_before_loading(monkeypatch, dtype, remedy):
    """As older builds answer: "slow_conv2d_cpu" not implemented for 'Half'."""
    convolve = F.conv2d

    def lacking(image, *args, **kwargs):
        if image.dtype == dtype:
            raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'\nmore lines")
        return convolve(image, *args, **kwargs)

    monkeypatch.setattr(F, "conv2d", lacking)
    devices._missing.cache_clear()
    try:
        with pytest.raises(ConfigError, match=f"'cpu' does not compute in {dtype}.*{remedy}"):
            load_backbone("sd1.5", dtype=dtype)
        assert devices.check_placement("cpu", torch.float32) == torch.device("cpu")
    finally:
        devices._missing.cache_clear()


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 4, 64, 64), ImageError, r"\(3, height, width\), got \(4, 64, 64\)"),
        (torch.zeros(64, 64), ImageError, r"got \(64, 64\)"),
        (torch.zeros(1, 2, 3, 64, 64), ImageError, "must be"),
        (np.zeros((64, 64, 5), np.uint8), ImageError, r"1 \| 3 \| 4"),
        (torch.full((3, 64, 64), float("nan")), ImageError, "holds NaN"),
        (np.full((64, 64, 3), np.inf), ImageError, "holds NaN or infinity"),
        (Image.fromarray(np.full((64, 64), np.nan, np.float32)), ImageError, "nan"),
        (torch.full((3, 64, 64), 255.0), ImageError, r"divide by 127\.5 and subtract 1"),
        (np.full((64, 64, 3), 255.0), ImageError, "divide by 255"),
        (np.full((64, 64, 3), -1.0), ImageError, r"values in \[-1, 1\]: add 1 and halve"),
        (np.zeros((64, 64, 3), bool), ImageError, "must be uint8, uint16 or float"),
        ([], ShapeError, "got no images"),
        (torch.zeros(0, 3, 64, 64), ShapeError, "got no images"),
        (np.zeros((0, 64, 64, 3), np.uint8), ShapeError, "got no images"),
        (torch.zeros(3, 0, 64), ImageError, "must be"),
        wrong_type(3.5, ImageError, "got float"),
        wrong_type(None, ImageError, "got NoneType"),
    ],
    ids=map(str, range(17)),
)
def test_pictures_that_are_none(encoder, images, error, message):
    with pytest.raises(error, match=message):
        encoder(images, "red")


def test_mixed_sizes_need_a_common_one(encoder):
    images = [Image.new("RGB", (64, 64)), Image.new("RGB", (64, 72))]
    assert len(encoder(images)) == 2  # squashed
    whole = DiffusionEncoder.from_pretrained(encoder.backbone, taps=TAPS, resize="none")
    with pytest.raises(ShapeError, match=r"one size with resize='none', got .*72.*one by one"):
        whole(images)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        wrong_type(["red", None], "must be strings, got NoneType at 1"),
        wrong_type([b"red"], "must be strings, got bytes at 0"),
        wrong_type(b"red", "must be strings, got int at 0"),
        wrong_type(3, "a string or a list of strings, got int"),
        wrong_type([["red"]], "must be strings, got list at 0"),
        ([], "0 prompts, 1 images"),
        (["red", "blue"], "2 prompts, 1 images"),
        ("half \ud800 a pair", "no valid Unicode"),
    ],
    ids=map(str, range(8)),
)
def test_prompts_that_are_no_texts(encoder, prompts, message):
    with pytest.raises(PromptError, match=message):
        encoder(IMAGE, prompts)


def test_embeddings_of_another_model_are_refused(encoder, sdxl):
    size = (64, 64)
    with pytest.raises(ShapeError, match=r"have width 24, the U-Net of .* reads 16"):
        encoder(IMAGE, sdxl.backbone.embed(["red"], size=size))
    with pytest.raises(ShapeError, match="needs pooled_prompt_embeds and time_ids"):
        sdxl(IMAGE, PromptEmbeds(torch.zeros(1, 77, 24)))
    with pytest.raises(ShapeError, match="1 images need 1 prompt or 1, got 2"):
        encoder(IMAGE, encoder.backbone.embed(["red", "blue"], size=size))


@pytest.mark.parametrize("noise", ["shared", None])
def test_timesteps_of_another_schedule_are_refused_at_once(tiny_sd_folder, noise):
    backbone = load_backbone(tiny_sd_folder)
    backbone.scheduler = type(backbone.scheduler)(num_train_timesteps=100)
    options = {"taps": TAPS, "noise": noise}
    assert DiffusionEncoder(backbone, EncoderConfig(timestep=99, **options))(IMAGE).isfinite().all()
    for timestep in (100, (50, 261)):
        with pytest.raises(ConfigError, match=r"must be in \[0, 100\) for the schedule of"):
            DiffusionEncoder(backbone, EncoderConfig(timestep=timestep, **options))


@pytest.mark.parametrize(
    "timestep", [1000, -1, wrong_type(0.5), (50, 1000), wrong_type("50"), wrong_type(999.0)]
)
def test_timesteps_that_are_none(timestep):
    with pytest.raises(ConfigError, match="timestep must be"):
        EncoderConfig(timestep=timestep)


@pytest.mark.parametrize("conditioning", [None, "cond", "uncond", "concat"])
def test_guidance_that_nothing_uses_is_refused(encoder, conditioning):
    with pytest.raises(ConfigError, match=r"guidance_scale=4\.5 is read by .*'cfg' alone"):
        encoder.extract(IMAGE, "red", conditioning=conditioning, guidance_scale=4.5)
    features = encoder.extract(IMAGE, "red", conditioning="cfg", guidance_scale=4.5)
    if conditioning is not None:
        with pytest.raises(ConfigError, match=r"read by .*'cfg' alone"):
            features.select(conditioning, guidance_scale=2.0)
    with pytest.raises(ConfigError, match="finite"):
        features.select("cfg", guidance_scale=float("inf"))


@pytest.mark.parametrize(
    "value", [wrong_type(512), wrong_type("own"), (0, 64), wrong_type((64, 64, 64))]
)
def test_original_sizes_that_are_none(value):
    with pytest.raises(ConfigError, match="original_size must be"):
        EncoderConfig(original_size=value)


def test_an_original_size_that_nothing_reads_is_refused(encoder):
    with pytest.raises(ConfigError, match="original_size is read by SDXL alone"):
        DiffusionEncoder(encoder.backbone, EncoderConfig(taps=TAPS, original_size="image"))
