"""Arguments are what they say, whoever made them; what is no number comes out nowhere."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

import builders
from diffenc import CrossAttnScorer, DiffusionEncoder
from diffenc.checks.arguments import number as real
from diffenc.checks.arguments import pair, whole
from diffenc.config import EncoderConfig
from diffenc.denoiser.lora.options import LoraOptions
from diffenc.errors import BackboneError, ConfigError, NonFiniteError
from diffenc.features import Features
from diffenc.hosts.spec import TowerSpec
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.mllm.training.config import (
    AdaptConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from diffenc.models import load_backbone
from diffenc.models.sd import StableDiffusion
from diffenc.scoring.config import ScorerConfig
from marks import wrong_type
from state_builders import TEXT, picture, tiny_backbone

OPTIM = {"learning_rate": 1e-3, "batch_size": 8, "device_batch_size": 4}
DATA = {"annotations": "a.json", "images": "pictures"}
MAKERS = {
    EncoderConfig: {},
    ScorerConfig: {},
    LoraOptions: {},
    TowerSpec: {"model": "shapes"},
    ModelConfig: {},
    DataConfig: DATA,
    OptimConfig: OPTIM,
    AdaptConfig: {},
    TrainConfig: {"stage": "align", "output": "run", "data": DataConfig(**DATA)},
}
FIELDS = [(kind, each) for kind in MAKERS for each in dataclasses.fields(kind)]


INTS = [(kind, each.name) for kind, each in FIELDS if str(each.type) in ("int", "<class 'int'>")]
INTS += [
    (kind, each.name)
    for kind, each in FIELDS
    if str(each.type).startswith("int |") and "tuple" not in str(each.type)
]
FLOATS = [
    (kind, each.name)
    for kind, each in FIELDS
    if str(each.type) in ("float", "<class 'float'>") or str(each.type).startswith("float |")
]
FLAGS = [(kind, each.name) for kind, each in FIELDS if str(each.type) in ("bool", "<class 'bool'>")]


def test_the_fields_that_are_tried_are_all():
    assert len(INTS) > 25
    assert len(FLOATS) > 10
    assert len(FLAGS) >= 8


@pytest.mark.wrong_type
@pytest.mark.parametrize(("kind", "name"), INTS, ids=str)
def test_what_is_no_whole_number_is_no_int(kind, name):
    for value in (True, np.True_, 1.0, 2.5, math.nan, math.inf, "1", b"1", [1], np.float64(1), 1j):
        with pytest.raises(ConfigError, match=rf"{name} must be .*an int"):
            kind(**{**MAKERS[kind], name: value})


@pytest.mark.parametrize(("kind", "name"), INTS, ids=str)
def test_a_whole_number_is_one_that_torch_has_a_type_for(kind, name):
    for value in (2**63, -(2**63) - 1, int("9" * 23)):
        with pytest.raises(ConfigError, match=rf"{name} must be .*an int.*64 bits"):
            kind(**{**MAKERS[kind], name: value})


@pytest.mark.wrong_type
@pytest.mark.parametrize(("kind", "name"), FLOATS, ids=str)
def test_what_is_no_finite_number_is_no_float(kind, name):
    for value in (
        True,
        np.False_,
        math.nan,
        -math.inf,
        "1.0",
        [1.0],
        np.float32("nan"),
        1j,
        10**400,
    ):
        with pytest.raises(ConfigError, match=rf"{name} must be .*a finite number"):
            kind(**{**MAKERS[kind], name: value})


@pytest.mark.wrong_type
@pytest.mark.parametrize(("kind", "name"), FLAGS, ids=str)
def test_what_is_no_truth_value_is_no_flag(kind, name):
    for value in (1, 0, "yes", None, np.int64(1), []):
        with pytest.raises(ConfigError, match=rf"{name} must be .*True or False"):
            kind(**{**MAKERS[kind], name: value})


@pytest.mark.wrong_type
def test_numpy_s_numbers_become_plain_ones():
    config = EncoderConfig(
        timestep=np.arange(10, 40, 10),
        size=[np.int32(64), np.uint8(32)],
        seed=np.int64(3),
        draws=np.uint16(2),
        grid=np.int8(4),
        batch_size=np.int64(5),
        guidance_scale=np.float32(2.5),
        taps=["mid_block"],
    )
    plain = EncoderConfig(
        timestep=(10, 20, 30),
        size=(64, 32),
        seed=3,
        draws=2,
        grid=4,
        batch_size=5,
        guidance_scale=2.5,
        taps=("mid_block",),
    )
    assert config == plain
    assert json.loads(json.dumps(config.to_dict())) == json.loads(json.dumps(plain.to_dict()))
    scorer = ScorerConfig(
        timesteps=[np.int64(5)], attention=np.True_, layer_weights=[np.float64(1)]
    )
    assert json.dumps(scorer.to_dict()) == json.dumps(
        ScorerConfig(timesteps=(5,), attention=True, layer_weights=(1.0,)).to_dict()
    )
    assert str(TowerSpec(model="shapes", timestep=np.int64(20))) == "diffenc:shapes?t=20"


@pytest.mark.parametrize(
    "options",
    [
        wrong_type({"size": (64,)}),
        wrong_type({"size": "64"}),
        wrong_type({"size": (64, 32.0)}),
        wrong_type({"size": (64, True)}),
        wrong_type({"grid": ()}),
        wrong_type({"grid": (4, 4, 4)}),
        {"size": (0, 4)},
        wrong_type({"timestep": "50"}),
        wrong_type({"timestep": {50: 1}}),
        wrong_type({"taps": (1,)}),
        wrong_type({"original_size": (64,)}),
        wrong_type({"seed": None}),
        wrong_type({"draws": None}),
        wrong_type({"noise": 3}),
        wrong_type({"resize": ["crop"]}),
    ],
    ids=str,
)
def test_options_of_another_shape_are_refused_in_a_sentence(options):
    (name,) = options
    with pytest.raises(ConfigError, match=rf"{name} must be"):
        EncoderConfig(**options)


def test_the_checks_themselves():
    assert whole("n", np.int16(-3)) == -3
    assert type(whole("n", np.int16(3))) is int
    assert [whole("n", edge) for edge in (-(2**63), 2**63 - 1)] == [-(2**63), 2**63 - 1]
    with pytest.raises(ConfigError, match="n must be an int of 1 or more, of 64 bits at most"):
        whole("n", 2**63, least=1)
    assert type(real("x", np.float16(0.5))) is float
    assert real("x", 3) == 3.0
    assert pair("size", [3, 4]) == (3, 4)
    assert pair("size", None) is None
    for wrong in (0, -1, (1,), (1, 2, 3), "3", 2.0, (1, "2"), {1: 2}):
        with pytest.raises(ConfigError, match=r"positive int or \(height, width\)"):
            pair("size", wrong)


@pytest.mark.wrong_type
@pytest.mark.parametrize("seed", [1.0, math.nan, None, "x", True, 1 + 0j])
def test_a_seed_is_a_whole_number_wherever_it_is_passed(seed):
    with pytest.raises(ConfigError, match="seed must be an int"):
        shared_noise((4, 8, 8), seed=seed, timestep=3)
    if seed is not None:
        scorer = CrossAttnScorer.from_pretrained(tiny_backbone(), timesteps=(300,))
        for call in (
            lambda: scorer(picture(), [TEXT], seed=seed),
            lambda: scorer.word_maps(picture(), TEXT, ["red"], seed=seed),
        ):
            with pytest.raises(ConfigError, match="seed must be an int"):
                call()


def test_equal_seeds_draw_equal_noise():
    plain = shared_noise((2, 3, 3), seed=7, timestep=5)
    assert torch.equal(plain, shared_noise((2, 3, 3), seed=np.int64(7), timestep=np.uint8(5)))


SCHEDULES = {
    "beta above one": {"beta_end": 50.0},
    "negative beta": {"beta_start": -0.1, "beta_end": -0.01},
    "no noise": {"beta_start": 0.0, "beta_end": 0.0},
    "nan": {"trained_betas": [math.nan] * 1000},
}


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_that_is_none_is_refused(options):
    scheduler = DDPMScheduler(**options)
    parts = {
        "unet": builders.tiny_unet(),
        "vae": builders.tiny_vae(),
        "text_encoder": builders.tiny_text_encoder(),
        "tokenizer": builders.tiny_tokenizer(),
    }
    with pytest.raises(BackboneError, match="noise levels of DDPMScheduler must fall"):
        StableDiffusion(name="tiny", scheduler=scheduler, **parts)
    with pytest.raises(ConfigError, match="noise levels of DDPMScheduler must fall"):
        add_noise(scheduler, torch.zeros(1, 4, 8, 8), torch.zeros(4, 8, 8), 500)
    backbone = tiny_backbone()
    with pytest.raises(BackboneError, match="noise levels"):
        backbone.scheduler = scheduler
    backbone.scheduler.alphas_cumprod[:] = scheduler.alphas_cumprod
    with pytest.raises(ConfigError, match="noise levels"):
        DiffusionEncoder(backbone).extract(picture())


def test_a_schedule_that_ends_in_pure_noise_is_one():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    assert float(scheduler.alphas_cumprod[-1]) < 1e-7
    noisy = add_noise(scheduler, torch.ones(1, 4, 8, 8), torch.zeros(4, 8, 8), 999)
    assert float(noisy.abs().max()) < 1e-3


KINDS = [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_weights_that_a_cast_would_spoil_are_refused(tmp_path, tiny_sd_folder, dtype):
    import shutil

    state = load_file(tiny_sd_folder / "unet" / "diffusion_pytorch_model.safetensors")
    state["mid_block.resnets.0.conv1.weight"] = state["mid_block.resnets.0.conv1.weight"].to(dtype)
    with pytest.raises(BackboneError, match=r"1 weights .*'mid_block\.resnets\.0\.conv1\.weight'"):
        load_backbone(tiny_sd_folder, unet=state)
    folder = tmp_path / "sd"
    shutil.copytree(tiny_sd_folder, folder)
    save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors")
    for options in ({}, {"keep_taps": ("mid_block",)}):
        with pytest.raises(BackboneError, match=r"1 weights .* are in .*quantised"):
            load_backbone(folder, **options)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_module_with_such_weights_is_refused_too(tiny_sd_folder, dtype):
    backbone = tiny_backbone()
    unet = builders.tiny_unet()
    weight = unet.conv_in.weight
    unet.conv_in.weight = torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(BackboneError, match=r"1 weights .*conv_in\.weight"):
        backbone.unet = unet
    text = builders.tiny_text_encoder()
    embedding = text.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(embedding.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(BackboneError, match="of the text encoder"):
        StableDiffusion(
            name="tiny",
            unet=backbone.unet,
            vae=backbone.vae,
            scheduler=backbone.scheduler,
            text_encoder=text,
            tokenizer=backbone.tokenizer,
        )
    given = builders.tiny_text_encoder()
    given.get_input_embeddings().weight = embedding.weight
    with pytest.raises(BackboneError, match="of the given text_encoder"):
        load_backbone(tiny_sd_folder, text_encoder=given)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("use_cache", [True, False])
def test_latents_that_are_no_numbers_come_out_nowhere(value, use_cache):
    backbone = tiny_backbone()
    with torch.no_grad():
        backbone.vae.quant_conv.bias[0] = value
    encoder = DiffusionEncoder(backbone, EncoderConfig(taps=("latents",)), use_cache=use_cache)
    scorer = CrossAttnScorer.from_pretrained(backbone, timesteps=(300,), use_cache=use_cache)
    for call in (
        lambda: encoder.extract(picture()),
        lambda: encoder(picture()),
        lambda: scorer(picture(), [TEXT]),
        lambda: scorer.word_maps(picture(), TEXT, ["red"]),
    ):
        for _ in range(2):  # nothing of it was kept
            with pytest.raises(NonFiniteError, match="latents of AutoencoderKL"):
                call()


def test_word_maps_of_a_broken_unet_are_refused():
    backbone = tiny_backbone()
    with torch.no_grad():
        backbone.unet.conv_in.bias[0] = math.nan
    scorer = CrossAttnScorer.from_pretrained(backbone, timesteps=(300,))
    for preset in (None, "daam"):
        with pytest.raises(NonFiniteError, match="attention maps"):
            scorer.word_maps(picture(), TEXT, ["red"], preset=preset)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_embeddings_that_are_no_numbers_are_refused(value):
    encoder = DiffusionEncoder(tiny_backbone())
    states = torch.zeros(1, 77, 8)
    states[0, 3, 2] = value
    with pytest.raises(NonFiniteError, match="prompt_embeds that were passed hold NaN or infinity"):
        encoder.extract(picture(), PromptEmbeds(states))


def test_guidance_that_leaves_the_numbers_is_refused():
    features = Features(
        uncond={"mid_block": torch.zeros(1, 2, 3, 3)},
        cond={"mid_block": torch.full((1, 2, 3, 3), 4.0)},
        conditioning="cond",
        guidance_scale=1.0,
        grid=(3, 3),
    )
    with pytest.raises(NonFiniteError, match=r"'mid_block' under guidance_scale=3e\+38"):
        features.select("cfg", guidance_scale=3e38)
    for wrong in (math.nan, math.inf, 1e39, "2", True):
        with pytest.raises(ConfigError, match="guidance_scale must be a finite number"):
            features.select("cfg", guidance_scale=wrong)


@pytest.mark.wrong_type
@pytest.mark.parametrize("grid", [(4,), "4", 0, 2.0, (2, 2, 2)])
def test_a_grid_of_tokens_is_a_side_or_two(grid):
    features = DiffusionEncoder(tiny_backbone()).extract(picture())
    with pytest.raises(ConfigError, match="grid must be"):
        features.tokens(grid)
    assert features.tokens([2, 3]).shape[1] == 6
    assert features.tokens(np.int64(2)).shape[1] == 4
