import torch

from diffenc.inputs.latents import encode_latents


def test_the_mode_is_scaled_and_repeatable(tiny_vae):
    pixel_values = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = encode_latents(tiny_vae, pixel_values)
    expected = tiny_vae.encode(pixel_values).latent_dist.mean * tiny_vae.config.scaling_factor
    assert latents.shape == (2, 4, 8, 12)
    torch.testing.assert_close(latents, expected, atol=0, rtol=0)


def test_samples_follow_their_seed_alone(tiny_vae):
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1

    def sample(seed: int, rows: slice = slice(None)) -> torch.Tensor:
        return encode_latents(tiny_vae, pixel_values[rows], posterior="sample", seed=seed)

    state = torch.random.get_rng_state()
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    torch.testing.assert_close(sample(1)[1:], sample(1, slice(1, 2)))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_vae_that_overflows_is_brought_to_float32(tiny_vae):
    import copy

    vae = copy.deepcopy(tiny_vae).half()
    vae.register_to_config(force_upcast=True)
    latents = encode_latents(vae, torch.zeros(1, 3, 16, 16))
    assert vae.dtype == torch.float32
    assert latents.dtype == torch.float32
