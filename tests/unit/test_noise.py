import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from diffenc.errors import ConfigError
from diffenc.inputs.noise import add_noise, shared_noise

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_noise_depends_on_its_arguments_alone():
    state = torch.random.get_rng_state()
    first = shared_noise((4, 6, 8), seed=0, timestep=50)
    torch.randn(3)
    assert torch.equal(shared_noise((4, 6, 8), seed=0, timestep=50), first)
    torch.random.set_rng_state(state)
    for other in ({"seed": 1}, {"timestep": 51}, {"draw": 1}):
        assert not torch.equal(
            shared_noise((4, 6, 8), **{"seed": 0, "timestep": 50, **other}), first
        )
    assert torch.equal(torch.random.get_rng_state(), state)


def test_noise_is_standard_normal():
    noise = shared_noise((4, 128, 128), seed=3, timestep=1)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize("timestep", [0, 50, 261, 999])
def test_noising_equals_the_scheduler_of_diffusers(timestep):
    scheduler = DDPMScheduler(**SCHEDULE)
    latents, noise = torch.randn(2, 4, 6, 8), torch.randn(4, 6, 8)
    expected = scheduler.add_noise(latents, noise.expand_as(latents), torch.tensor([timestep] * 2))
    torch.testing.assert_close(
        add_noise(scheduler, latents, noise, timestep), expected, atol=1e-6, rtol=0
    )


def test_noising_ignores_the_sigma_parametrisation_of_euler():
    latents, noise = torch.randn(1, 4, 8, 8), torch.randn(4, 8, 8)
    euler, ddpm = EulerDiscreteScheduler(**SCHEDULE), DDPMScheduler(**SCHEDULE)
    torch.testing.assert_close(
        add_noise(euler, latents, noise, 500), add_noise(ddpm, latents, noise, 500)
    )


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_timestep_outside_the_schedule_is_refused(timestep):
    with pytest.raises(ConfigError, match=r"\[0, 1000\)"):
        add_noise(
            DDPMScheduler(**SCHEDULE), torch.zeros(1, 4, 8, 8), torch.zeros(4, 8, 8), timestep
        )
