"""Presets follow the published definitions: each against a plain program written from them."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffenc import DiffusionEncoder, list_taps
from diffenc.errors import ConfigError, TapError
from diffenc.inputs.noise import shared_noise
from diffenc.models import match_taps
from diffenc.models.presets import preset_options


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def parts(folder, image, prompt):
    pipe = DiffusionPipeline.from_pretrained(folder)
    values = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        posterior = pipe.vae.encode(values).latent_dist
        states = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    return pipe, posterior, states


def hooked(pipe, path, noisy, timestep, states):
    found = []
    handle = pipe.unet.get_submodule(path).register_forward_hook(lambda _m, _a, o: found.append(o))
    with torch.no_grad():
        pipe.unet(noisy, timestep, encoder_hidden_states=states)
    handle.remove()
    return found[0]


def noised(pipe, latents, noise, timestep):
    signal = pipe.scheduler.alphas_cumprod[timestep]
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def test_dift_is_the_mean_over_draws_of_posterior_and_noise(tiny_sd21_folder, image):
    """DIFT: the image repeated 8 times, posterior sampled, one noise draw each, then the mean."""
    pipe, posterior, states = parts(tiny_sd21_folder, image, "a photo of a circle")
    samples, noises = [], []
    for draw in range(8):
        drawn = shared_noise((4, 8, 8), seed=0, timestep=-1, draw=draw)
        samples.append(posterior.mean[0] + posterior.std[0] * drawn)
        noises.append(shared_noise((4, 8, 8), seed=0, timestep=261, draw=draw))
    latents = torch.stack(samples) * pipe.vae.config.scaling_factor
    noisy = noised(pipe, latents, torch.stack(noises), 261)
    expected = hooked(pipe, "up_blocks.1", noisy, 261, states.expand(8, -1, -1)).mean(0)
    encoder = DiffusionEncoder.from_pretrained(tiny_sd21_folder, preset="dift", size=64)
    ours = encoder.extract(image, "a photo of a circle")["up_blocks.1"][0]
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def sample(pipe, posterior):
    noise = shared_noise((4, 8, 8), seed=0, timestep=-1)
    return (posterior.mean + posterior.std * noise) * pipe.vae.config.scaling_factor


def test_cleandift_reads_clean_latents(tiny_sd21_folder, image):
    pipe, posterior, states = parts(tiny_sd21_folder, image, "red")
    latents = sample(pipe, posterior)
    expected = hooked(pipe, "up_blocks.1", latents, 261, states)
    encoder = DiffusionEncoder.from_pretrained(tiny_sd21_folder, preset="cleandift", size=64)
    ours = encoder.extract(image, "red")["up_blocks.1"]
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_hyperfeatures_reads_every_decoder_resnet_before_its_sum(tiny_sd_folder, image):
    pipe, posterior, states = parts(tiny_sd_folder, image, "red")
    latents = sample(pipe, posterior)
    noisy = noised(pipe, latents, shared_noise((4, 8, 8), seed=0, timestep=50), 50)
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, preset="hyperfeatures", size=64)
    features = encoder.extract(image, "red")
    assert len(features) == 12
    for path in ("up_blocks.0.resnets.0.conv2", "up_blocks.3.resnets.2.conv2"):
        expected = hooked(pipe, path, noisy, 50, states)
        assert (features[path] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("alias", "channels"),
    [("sd1.5", [1280, 1280, 640, 320]), ("sdxl", [1280, 1280, 640, 640])],
)
def test_gdf_sets_have_the_published_channels(alias, channels):
    family = "sdxl" if alias == "sdxl" else "sd"
    taps = match_taps(preset_options("gdf", family)["taps"], list_taps(alias))
    assert [tap.channels for tap in taps] == channels


def test_every_preset_samples_the_posterior_as_the_released_code_does():
    for name in ("gdf", "dift", "cleandift", "hyperfeatures"):
        assert preset_options(name, "sd")["posterior"] == "sample"
    assert preset_options("gdf", "sdxl")["uncond"] == "empty"
    assert "uncond" not in preset_options("gdf", "sd")


def test_taps_that_a_preset_asks_for_are_not_held_against_the_caller():
    message = r"preset 'gdf' reads taps.*: no tap matches 'up_blocks\.1\.resnets\.2'\. The preset"
    for model in ("shapes", DiffusionEncoder.from_pretrained("shapes").backbone):
        with pytest.raises(TapError, match=message):
            DiffusionEncoder.from_pretrained(model, preset="gdf")
        with pytest.raises(TapError, match=r"no tap matches 'up_block'\. Did you mean"):
            DiffusionEncoder.from_pretrained(model, preset="gdf", taps="up_block")


def test_options_win_over_a_preset(tiny_sd_folder):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, preset="dift", draws=1, size=64)
    assert (encoder.config.draws, encoder.config.timestep) == (1, 261)


def test_unknown_presets_and_families_are_refused(tiny_sd_folder, tiny_sdxl_folder):
    with pytest.raises(ConfigError, match="Did you mean 'dift'"):
        DiffusionEncoder.from_pretrained(tiny_sd_folder, preset="difft")
    with pytest.raises(ConfigError, match="defined for \\['sd'\\], and this model is 'sdxl'"):
        DiffusionEncoder.from_pretrained(tiny_sdxl_folder, preset="dift")
