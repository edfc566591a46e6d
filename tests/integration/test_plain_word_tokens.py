"""Word tokens equal a plain program on diffusers: hooks, its own softmax, its own weighting."""

import math

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.nn import functional as F

from diffenc import DiffusionEncoder
from diffenc.inputs.noise import shared_noise

TEXT = "a red zebra left of a blue circle"  # "zebra" is spelt: five tokens
SPANS = {
    **{"a": [1, 10], "red": [2], "zebra": [3, 4, 5, 6, 7], "left": [8], "of": [9]},
    **{"blue": [11], "circle": [12]},
}
CASES = {
    "tiny_sd21_base_folder": (
        ("up_blocks.1", "up_blocks.2.attentions.1"),
        [f"up_blocks.1.attentions.{n}.transformer_blocks.0.attn2" for n in range(3)]
        + [f"up_blocks.2.attentions.{n}.transformer_blocks.0.attn2" for n in range(2)],
    ),
    "tiny_sdxl_folder": (
        ("up_blocks.0", "up_blocks.1.attentions.0"),
        [
            f"up_blocks.0.attentions.{n}.transformer_blocks.{m}.attn2"
            for n in range(3)
            for m in range(3)
        ]
        + [f"up_blocks.1.attentions.0.transformer_blocks.{m}.attn2" for m in range(2)],
    ),
}
TIMESTEP = 50


def plain_pass(pipe, image, taps, layers):
    """Features of the taps, and probabilities (cells, tokens) of each layer, mean over heads."""
    pixels = np.asarray(image, np.float32)
    values = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
    latents = pipe.vae.encode(values).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = shared_noise(tuple(latents.shape[1:]), seed=0, timestep=TIMESTEP)[None]
    signal = pipe.scheduler.alphas_cumprod[TIMESTEP]
    noisy = signal**0.5 * latents + (1 - signal) ** 0.5 * noise
    encoded = pipe.encode_prompt(
        TEXT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    kwargs = {"encoder_hidden_states": encoded[0]}
    if len(encoded) == 4:
        time_ids = torch.tensor([[64, 64, 0, 0, 64, 64]], dtype=torch.float32)
        kwargs["added_cond_kwargs"] = {"text_embeds": encoded[2], "time_ids": time_ids}
    features, probabilities, handles = {}, {}, []

    def keep(name):
        def hook(_module, _args, out):
            features[name] = out[0] if isinstance(out, tuple) else out

        return hook

    def attend(name):
        def hook(module, args, _kwargs):
            queries = (args[0][0] @ module.to_q.weight.T).chunk(module.heads, dim=1)
            keys = (encoded[0][0] @ module.to_k.weight.T).chunk(module.heads, dim=1)
            heads = [
                (q @ k.T / math.sqrt(q.shape[1])).softmax(dim=1)
                for q, k in zip(queries, keys, strict=True)
            ]
            probabilities[name] = torch.stack(heads).mean(dim=0)

        return hook

    for name in taps:
        handles.append(pipe.unet.get_submodule(name).register_forward_hook(keep(name)))
    for name in layers:
        module = pipe.unet.get_submodule(name)
        handles.append(module.register_forward_pre_hook(attend(name), with_kwargs=True))
    pipe.unet(noisy, TIMESTEP, **kwargs)
    for handle in handles:
        handle.remove()
    return features, probabilities


def resized(square, side):
    """A map on another grid of a power of two: means where it is coarser, else bilinear."""
    own = square.shape[-1]
    if side <= own:
        return square.reshape(side, own // side, side, own // side).mean(dim=(1, 3))
    return F.interpolate(square[None, None], size=(side, side), mode="bilinear")[0, 0]


def plain_map(probabilities, positions):
    """A word's map: of each layer in shares, joined by the divergence from the uniform map."""
    side = max(math.isqrt(len(layer)) for layer in probabilities.values())
    total, weights = torch.zeros(side, side), 0.0
    for layer in probabilities.values():
        shares = layer[:, positions].sum(dim=1)
        shares = shares / shares.sum()
        weight = float(math.log(len(shares)) + (shares * shares.log()).sum())
        grown = resized(shares.view(math.isqrt(len(shares)), -1), side)
        total, weights = total + weight * grown / grown.sum(), weights + weight
    return total / weights


def plain_place(shares):
    side = len(shares)
    middles = [(cell + 0.5) / side for cell in range(side)]
    rows, columns = shares.sum(dim=1).tolist(), shares.sum(dim=0).tolist()
    centre = [sum(m * s for m, s in zip(middles, part, strict=True)) for part in (rows, columns)]
    spread = [
        math.sqrt(sum((m - c) ** 2 * s for m, s in zip(middles, part, strict=True)))
        for c, part in zip(centre, (rows, columns), strict=True)
    ]
    return torch.tensor(centre + spread)


@pytest.mark.long
@pytest.mark.parametrize("kind", CASES)
@torch.no_grad()
def test_word_tokens_and_their_places_equal_a_plain_program(request, kind):
    folder = request.getfixturevalue(kind)
    taps, layers = CASES[kind]
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(pixels)
    encoder = DiffusionEncoder.from_pretrained(folder, taps=taps, timestep=TIMESTEP, size=64)
    ours = encoder.word_tokens(image, TEXT, rest=True)
    assert ours.words == ((*SPANS, "<rest>"),)
    features, probabilities = plain_pass(
        DiffusionPipeline.from_pretrained(folder), image, taps, layers
    )
    every = [position for span in SPANS.values() for position in span]
    others = [position for position in range(77) if position not in every]
    for index, positions in enumerate([*SPANS.values(), others]):
        shares = plain_map(probabilities, positions)
        parts = []
        for tap in taps:
            weights = resized(shares, features[tap].shape[-1])
            parts.append((features[tap][0] * weights / weights.sum()).sum(dim=(1, 2)))
        token = torch.cat(parts)
        assert (ours.tokens[0, index] - token).abs().max() <= 1e-5 * token.abs().max()
        assert (ours.maps[0, index] - shares).abs().max() <= 1e-5
        assert (ours.places[0, index] - plain_place(shares)).abs().max() <= 1e-5
