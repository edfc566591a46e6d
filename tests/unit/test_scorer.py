import pytest
import torch
from diffusers import DDPMScheduler
from jaxtyping import TypeCheckError

from diffenc.denoiser.attention import cross_attention_layers
from diffenc.errors import ConfigError, PromptError
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.models import load_backbone
from diffenc.passes.forward import predict_noise, read_attention
from diffenc.scorer import denoising_scores, word_maps

TEXTS = ["a red circle", "a blue square left of a circle", ""]


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder):
    return load_backbone(tiny_sd_folder)


@pytest.fixture(scope="module")
def v_backbone(tiny_sd21_folder):
    return load_backbone(tiny_sd21_folder)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl_folder):
    return load_backbone(tiny_sdxl_folder)


def latents(count=2, size=(8, 16)):
    return torch.randn(count, 4, *size, generator=torch.Generator().manual_seed(0))


def test_scores_follow_the_definition(backbone):
    alphas = DDPMScheduler.from_config(backbone.scheduler.config).alphas_cumprod
    expected = torch.zeros(2, 3)
    for i, image in enumerate(latents()):
        for j, text in enumerate(TEXTS):
            states = backbone.embed([text], size=(64, 128)).prompt_embeds
            for timestep in (100, 700):
                noise = shared_noise((4, 8, 16), seed=3, timestep=timestep)
                noisy = alphas[timestep].sqrt() * image + (1 - alphas[timestep]).sqrt() * noise
                predicted = backbone.unet(noisy[None], timestep, states).sample[0]
                expected[i, j] -= ((predicted - noise) ** 2).mean() / 2
    scores = denoising_scores(backbone, latents(), TEXTS, timesteps=(100, 700), seed=3)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_the_batch_and_leave_the_generator_alone(backbone):
    state = torch.random.get_rng_state()
    together = denoising_scores(backbone, latents(), TEXTS, timesteps=[50, 900])
    in_parts = denoising_scores(backbone, latents(), TEXTS, timesteps=[50, 900], batch_size=2)
    alone = denoising_scores(backbone, latents()[1:], TEXTS[1], timesteps=[50, 900])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(together, in_parts, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together[1:, 1:2], alone, rtol=1e-5, atol=1e-6)


def test_sdxl_is_scored_under_its_pooled_text(sdxl):
    assert denoising_scores(sdxl, latents(), TEXTS, timesteps=[500]).shape == (2, 3)


def test_noise_is_recovered_from_v(v_backbone, monkeypatch):
    """A model that knows v exactly gives back exactly the noise."""
    clean, timestep = latents(), 400
    noise = shared_noise((4, 8, 16), seed=0, timestep=timestep)
    noisy = add_noise(v_backbone.scheduler, clean, noise, timestep)
    velocity = v_backbone.scheduler.get_velocity(
        clean, noise.expand_as(clean), torch.tensor([timestep])
    )
    monkeypatch.setattr(v_backbone.unet, "forward", lambda *_args, **_kwargs: (velocity,))
    embeds = v_backbone.embed([""], size=(64, 128))
    predicted = predict_noise(v_backbone, noisy, timestep, embeds)
    torch.testing.assert_close(predicted, noise.expand_as(clean))
    monkeypatch.setattr(v_backbone.unet, "forward", lambda *_args, **_kwargs: (clean,))
    v_backbone.scheduler.register_to_config(prediction_type="sample")
    predicted = predict_noise(v_backbone, noisy, timestep, embeds)
    torch.testing.assert_close(predicted, noise.expand_as(clean))
    v_backbone.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ConfigError, match="predicts 'flow'"):
        predict_noise(v_backbone, noisy, timestep, embeds)


def test_word_maps_of_all_words_share_what_start_and_padding_leave(backbone):
    words = ["blue", "square", "left", "of", "circle"]
    text = "blue square left of circle"
    maps = word_maps(backbone, latents(), text, words, timesteps=[300, 600])
    assert maps.shape == (2, 5, 8, 16)
    assert maps.min() >= 0
    assert maps.sum(dim=1).max() < 1
    layer = cross_attention_layers(backbone.unet)[0]
    noise = shared_noise((4, 8, 16), seed=0, timestep=300)
    noisy = add_noise(backbone.scheduler, latents(), noise, 300)
    embeds = backbone.embed([text], size=(64, 128))
    others = [0, *range(6, 77)]
    of_others = read_attention(backbone, noisy, 300, embeds, others, [layer])[layer]
    of_words = word_maps(backbone, latents(), text, words, timesteps=[300], layers=[layer])
    torch.testing.assert_close(
        of_others.sum(dim=1) + of_words.sum(dim=1), torch.ones(2, *of_words.shape[2:])
    )


def test_pieces_of_a_word_are_added_up(backbone):
    spelt = word_maps(backbone, latents(), "a red zebra", ["zebra"], timesteps=[300])
    pieces = ["red zebra", "red"]
    both, red = word_maps(backbone, latents(), "a red zebra", pieces, timesteps=[300]).unbind(1)
    torch.testing.assert_close(both - red, spelt[:, 0], rtol=1e-4, atol=1e-6)


def test_word_maps_read_sdxl(sdxl):
    assert word_maps(sdxl, latents(), "a circle", ["circle"], timesteps=[9]).shape[:2] == (2, 1)


def test_bad_input(backbone):
    with pytest.raises(ConfigError, match="timesteps must hold one int or more"):
        denoising_scores(backbone, latents(), TEXTS, timesteps=[])
    for size in (-1, 0):  # of a negative one every score was 0, the best there is
        with pytest.raises(ConfigError, match="batch_size must be an int of 1 or more"):
            denoising_scores(backbone, latents(), TEXTS, timesteps=[50], batch_size=size)
    with pytest.raises((PromptError, TypeCheckError), match=r"one text or more|texts"):
        denoising_scores(backbone, latents(), [], timesteps=[50])
    with pytest.raises(ConfigError, match=r"\[0, 1000\)"):
        denoising_scores(backbone, latents(), TEXTS, timesteps=[1000])
    with pytest.raises((PromptError, TypeCheckError), match=r"got int|texts"):
        denoising_scores(backbone, latents(), [1])
    with pytest.raises(PromptError, match="'triangle' is no word"):
        word_maps(backbone, latents(), "a red circle", ["triangle"])
