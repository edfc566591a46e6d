import math

import pytest
import torch
from torch.nn import functional as F

from diffenc.denoiser.attention import cross_attention_layers
from diffenc.errors import PromptError, TapError
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.models import load_backbone
from diffenc.scoring.word_maps import daam_maps, word_maps, words_of

TEXT = "a red zebra left of a circle"
ZEBRA = [3, 4, 5, 6, 7]  # spelt


@pytest.fixture(scope="module")
def backbone(tiny_sd21_base_folder):
    return load_backbone(tiny_sd21_base_folder)


def latents(count=2, size=(8, 16)):
    return torch.randn(count, 4, *size, generator=torch.Generator().manual_seed(0))


def probabilities(backbone, image, timestep):
    """Per layer and head (cells, 77), from the inputs of each attention module."""
    noise = shared_noise((4, 8, 16), seed=0, timestep=timestep)
    noisy = add_noise(backbone.scheduler, image[None], noise, timestep)
    states = backbone.embed([TEXT], size=(64, 128)).prompt_embeds
    found, handles = {}, []

    def reader(name, attn):
        def read(_module, args, _kwargs):
            queries = (args[0][0] @ attn.to_q.weight.T).chunk(attn.heads, dim=1)
            keys = (states[0] @ attn.to_k.weight.T).chunk(attn.heads, dim=1)
            found[name] = [
                (q @ k.T / math.sqrt(q.shape[1])).softmax(dim=1)
                for q, k in zip(queries, keys, strict=True)
            ]

        return read

    for name in cross_attention_layers(backbone.unet):
        attn = backbone.unet.get_submodule(name)
        handles.append(attn.register_forward_pre_hook(reader(name, attn), with_kwargs=True))
    with torch.no_grad():
        backbone.unet(noisy, timestep, states)
    for handle in handles:
        handle.remove()
    return found


def as_grid(column):
    height = int(math.sqrt(len(column) // 2))
    return column.view(1, 1, height, 2 * height)


def test_daam_cuts_off_what_is_below_zero_in_the_sum_over_steps_without_the_middle(backbone):
    expected = torch.zeros(2, 8, 16)
    for row, image in enumerate(latents()):
        first, second = (probabilities(backbone, image, timestep) for timestep in (200, 600))
        resized = [
            F.interpolate(
                as_grid(one[:, token] + other[:, token]), size=(8, 16), mode="bicubic"
            ).clamp(min=0)
            for name in first
            if "mid_block" not in name
            for one, other in zip(first[name], second[name], strict=True)
            for token in ZEBRA
        ]
        expected[row] = torch.cat(resized).mean(dim=0)[0]
    ours = daam_maps(backbone, latents(), TEXT, ["zebra"], timesteps=(200, 600))
    torch.testing.assert_close(ours[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_heads_of_a_layer_can_be_chosen(backbone):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
    probs = probabilities(backbone, latents()[1], 200)[layer]
    assert len(probs) == 4
    expected = sum(probs[head][:, token] for head in (0, 3) for token in ZEBRA) / 2
    ours = word_maps(
        backbone, latents(), TEXT, ["zebra"], timesteps=[200], layers=[layer], heads=[0, 3]
    )
    torch.testing.assert_close(ours[1, 0], as_grid(expected)[0, 0], rtol=1e-5, atol=1e-6)


def test_a_head_that_a_layer_lacks_is_an_error(backbone):
    with pytest.raises(TapError, match="has heads 0 to"):
        word_maps(backbone, latents(), TEXT, ["red"], timesteps=[9], heads=[7])
    with pytest.raises(TapError, match="heads must hold one int or more"):
        word_maps(backbone, latents(), TEXT, ["red"], timesteps=[9], heads=[])


def test_words_of_a_text_are_distinct_and_without_punctuation():
    assert words_of("a red circle, a 'red' don't-know") == [
        *("a", "red", "circle", "don't", "know"),
    ]
    with pytest.raises(PromptError, match="no words to map"):
        words_of(" . ")
