"""The noise schedule of a model is the one that its own scheduler has, or the model is refused."""

import json
import math
import shutil

import diffusers
import pytest
import torch

from diffenc import DiffusionEncoder, load_backbone
from diffenc.errors import BackboneError, ConfigError
from diffenc.inputs.noise import add_noise, to_noise
from diffenc.models.schedules import make_scheduler

PLAIN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Every class of diffusers with betas that can be made without further libraries.
WITH_BETAS = [
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]


def with_scheduler(folder, target, config):
    """A copy of a model's folder with another scheduler."""
    shutil.copytree(folder, target)
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("config", [{}, PLAIN, {"num_train_timesteps": 37}], ids=str)
@pytest.mark.parametrize("name", WITH_BETAS)
def test_noise_levels_are_those_of_the_scheduler_itself_defaults_too(name, config):
    own = getattr(diffusers, name)(**config)
    found = make_scheduler({"_class_name": name, **config})
    torch.testing.assert_close(found.alphas_cumprod, own.alphas_cumprod, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("shape", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr_ends_in_noise_alone(shape):
    config = {**PLAIN, "beta_schedule": shape, "prediction_type": "v_prediction"}
    plain = make_scheduler(config).alphas_cumprod.sqrt()
    rescaled = make_scheduler({**config, "rescale_betas_zero_snr": True})
    # Algorithm 1 of Lin et al.: shifted to 0 at the end and scaled back at the beginning.
    expected = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])
    torch.testing.assert_close(
        rescaled.alphas_cumprod.sqrt(), expected, atol=2e-4, rtol=1e-3, check_dtype=False
    )
    assert rescaled.alphas_cumprod[-1] == 0
    latents, noise = torch.ones(2, 4, 3, 5), torch.randn(4, 3, 5)
    assert torch.equal(add_noise(rescaled, latents, noise, 999), noise.expand_as(latents))
    # Of noise alone v is minus the latents, and says nothing of the noise: that is the input.
    found = to_noise(
        rescaled, "v_prediction", -latents, noise.expand(2, 4, 3, 5), torch.tensor([999, 999])
    )
    assert torch.equal(found, noise.expand(2, 4, 3, 5))
    assert to_noise(rescaled, "sample", latents, latents, torch.tensor([999, 0])).isfinite().all()


def test_betas_that_are_written_out_win():
    betas = [0.1, 0.2, 0.3]
    levels = make_scheduler({"_class_name": "DDIMScheduler", "trained_betas": betas})
    expected = [math.prod(1 - beta for beta in betas[: n + 1]) for n in range(3)]
    assert levels.alphas_cumprod.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "'EDMEulerScheduler'.*betas"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", **PLAIN}, "EDMDPMSolver"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatch"),
        ({"_class_name": "CogVideoXDDIMScheduler", **PLAIN}, "CogVideoX"),
        ({"_class_name": "MyScheduler", **PLAIN}, "'MyScheduler'"),
        ({"_class_name": ["DDIMScheduler"], **PLAIN}, "DDIMScheduler"),
        ({}, "lacks .*beta_start"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "continuous"),
        ({**PLAIN, "prediction_type": "flow_prediction"}, "'flow_prediction'"),
        ({**PLAIN, "prediction_type": None}, "prediction_type must be one of"),
        ({**PLAIN, "prediction_type": ["epsilon"]}, "prediction_type must be one of"),
        ({**PLAIN, "beta_schedule": "exp"}, "beta_schedule must be one of.*'exp'"),
        ({**PLAIN, "beta_schedule": {}}, "beta_schedule must be one of"),
        ({**PLAIN, "beta_start": float("nan")}, "beta_start must be in"),
        ({**PLAIN, "beta_end": "0.012"}, "beta_end must be in"),
        ({**PLAIN, "beta_end": 2}, "beta_end must be in"),
        ({**PLAIN, "num_train_timesteps": 0}, "num_train_timesteps must be"),
        ({**PLAIN, "num_train_timesteps": 1000.0}, "num_train_timesteps must be"),
        ({**PLAIN, "num_train_timesteps": 10**15}, "num_train_timesteps must be"),
        ({**PLAIN, "rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr must be"),
        ({"trained_betas": []}, "trained_betas must be"),
        ({"trained_betas": [0.1, 1.5]}, "trained_betas must be"),
        ({"trained_betas": "abc"}, "trained_betas must be"),
        ({"trained_betas": [0.1], "num_train_timesteps": 2}, "contradicts itself"),
    ],
    ids=str,
)
def test_other_schedules_are_refused_by_what_they_are(config, said):
    with pytest.raises(BackboneError, match=said):
        make_scheduler(config)


def test_a_folder_of_another_kind_of_schedule_is_refused_before_weights_are_read(
    tiny_sdxl_folder, tmp_path
):
    config = {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"}
    folder = with_scheduler(tiny_sdxl_folder, tmp_path / "playground", config)
    for part in folder.glob("*/*.safetensors"):
        part.write_bytes(b"")
    with pytest.raises(BackboneError, match="EDMDPMSolverMultistepScheduler"):
        load_backbone(folder)


@pytest.mark.long
def test_a_folder_s_schedule_is_read_whole_and_saved_whole(tiny_sd_folder, tmp_path):
    config = {
        "_class_name": "HeunDiscreteScheduler",  # has betas of its own where none are stated
        "num_train_timesteps": 60,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    folder = with_scheduler(tiny_sd_folder, tmp_path / "model", config)
    encoder = DiffusionEncoder.from_pretrained(folder, taps=("mid_block",), timestep=59)
    levels = encoder.backbone.scheduler.alphas_cumprod
    assert (len(levels), float(levels[-1])) == (60, 0.0)
    assert encoder.backbone.prediction_type == "v_prediction"
    encoder.save_pretrained(tmp_path / "saved", include_backbone=True)
    again = DiffusionEncoder.from_pretrained(tmp_path / "saved").backbone
    assert torch.equal(again.scheduler.alphas_cumprod, levels)
    assert again.prediction_type == "v_prediction"
    with pytest.raises(ConfigError, match=r"\[0, 60\)"):
        DiffusionEncoder.from_pretrained(folder, taps=("mid_block",), timestep=60)


def test_scheduler_objects_are_held_to_the_same(tiny_sd_folder):
    backbone = load_backbone(tiny_sd_folder)
    parts = {name: getattr(backbone, name) for name in ("unet", "vae", "text_encoder", "tokenizer")}
    for scheduler in (
        diffusers.EDMEulerScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        diffusers.EulerDiscreteScheduler(timestep_type="continuous", sigma_min=0.1, sigma_max=9.0),
    ):
        with pytest.raises(BackboneError, match=type(scheduler).__name__):
            type(backbone)(name="mine", scheduler=scheduler, **parts)
