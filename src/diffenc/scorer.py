"""How well images and texts agree, and where in an image a word is seen."""

import math
from collections.abc import Sequence

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from diffenc.attention import word_token_positions
from diffenc.backbones.base import Backbone
from diffenc.errors import ConfigError
from diffenc.forward import predict_noise, read_attention
from diffenc.maps import to_grid
from diffenc.noise import add_noise, shared_noise
from diffenc.prompts import PromptEmbeds, match_batch

SCORE_TIMESTEPS = (189, 389, 589, 789, 989)
"""Noise levels of scores and word maps, as in the paper."""


def denoising_scores(
    backbone: Backbone,
    latents: Float[Tensor, "images c h w"],
    texts: str | Sequence[str],
    *,
    timesteps: Sequence[int] = SCORE_TIMESTEPS,
    seed: int = 0,
    batch_size: int = 16,
) -> Float[Tensor, "images texts"]:
    """Score each image under each text by how well the model finds the noise: higher is better.

    The negative mean squared error of the predicted noise, mean over timesteps, without guidance.
    All images and texts see the same noise. Scores of one image under several texts can be
    compared; those of several images under one text cannot, as some images are easier than others.

    Args:
        backbone: The model.
        latents: Of the images, without noise.
        texts: One or several.
        timesteps: Noise levels, scheduler steps.
        seed: Of the noise.
        batch_size: Texts per call of the U-Net.

    Returns:
        float32 scores on the CPU; 0 is the best there is.

    Raises:
        PromptError: A text is no text.
        ConfigError: No timestep, or one outside the schedule.

    Source:
        Li et al. 2023 (Diffusion Classifier), arXiv:2303.16203, equation 6.
    """
    texts = match_batch(texts, len(texts))
    embeds = _embed(backbone, latents, texts)
    errors = torch.zeros(len(latents), len(texts))
    for timestep in _checked(timesteps):
        noise, noisy_latents = _noised(backbone, latents, timestep, seed)
        for image, noisy in enumerate(noisy_latents):
            for start in range(0, len(texts), batch_size):
                part = embeds.select(start, start + batch_size)
                rows = noisy.expand(len(part), -1, -1, -1)
                with torch.no_grad():
                    error = predict_noise(backbone, rows, timestep, part).cpu() - noise
                errors[image, start : start + batch_size] += reduce(
                    error**2, "b c h w -> b", "mean"
                )
    return -errors / len(timesteps)


def word_maps(
    backbone: Backbone,
    latents: Float[Tensor, "images c h w"],
    text: str,
    words: Sequence[str],
    *,
    timesteps: Sequence[int] = SCORE_TIMESTEPS,
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> Float[Tensor, "images words gh gw"]:
    """Where each word of a text is seen: the share of a cell's cross-attention that it gets.

    The pieces of a word are added up. Layers are brought to the finest grid among them; the result
    is the mean over heads, layers and timesteps.

    Args:
        backbone: The model.
        latents: Of the images, without noise.
        text: The prompt.
        words: Words of it.
        timesteps: Noise levels, scheduler steps.
        layers: See `diffenc.attention.CrossAttnTaps`; None takes all.
        seed: Of the noise.

    Returns:
        float32 shares in [0, 1].

    Raises:
        PromptError: The text has no such word, or it was cut off.
        ConfigError: No timestep, or one outside the schedule.
        TapError: No cross-attention by that name.
    """
    spans = [word_token_positions(backbone.tokenizer, text, word) for word in words]
    positions = [position for span in spans for position in span]
    embeds = _embed(backbone, latents, [text])
    sums = []
    for timestep in _checked(timesteps):
        _, noisy_latents = _noised(backbone, latents, timestep, seed)
        maps = read_attention(backbone, noisy_latents, timestep, embeds, positions, layers)
        finest = max(((m.shape[2], m.shape[3]) for m in maps.values()), key=math.prod)
        sums.append(torch.stack([to_grid(m, finest) for m in maps.values()]).mean(dim=0))
    per_token = torch.stack(sums).mean(dim=0)
    per_word = per_token.split([len(span) for span in spans], dim=1)
    return torch.stack([maps_of_pieces.sum(dim=1) for maps_of_pieces in per_word], dim=1)


def _checked(timesteps: Sequence[int]) -> Sequence[int]:
    if not timesteps:
        raise ConfigError("timesteps must hold one scheduler step or more, got none")
    return timesteps


def _embed(backbone: Backbone, latents: Tensor, texts: Sequence[str]) -> PromptEmbeds:
    h, w = latents.shape[2:]
    return backbone.embed(texts, size=(h * backbone.reduction, w * backbone.reduction))


def _noised(
    backbone: Backbone, latents: Tensor, timestep: int, seed: int
) -> tuple[Float[Tensor, "c h w"], Float[Tensor, "images c h w"]]:
    """The noise of a timestep, on the CPU, and the latents that hold it."""
    c, h, w = latents.shape[1:]
    noise = shared_noise((c, h, w), seed=seed, timestep=timestep)
    return noise, add_noise(backbone.scheduler, latents, noise, timestep)
