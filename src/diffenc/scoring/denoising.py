"""How well a model finds the noise under each text: the plain function on latents."""

from collections.abc import Sequence

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from diffenc.checks.arguments import texts as listed
from diffenc.checks.arguments import whole, wholes
from diffenc.checks.fields import require_finite
from diffenc.errors import PromptError
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.inputs.prompts import match_batch
from diffenc.models.base import Backbone
from diffenc.passes.forward import predict_noise
from diffenc.scoring.config import SCORE_TIMESTEPS


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
    `diffenc.scorer.CrossAttnScorer` has this score as preset "diffusion-classifier", from pictures.

    Args:
        backbone: The text-to-image model.
        latents: Latents of the images, without noise.
        texts: One text or several.
        timesteps: Noise levels, as scheduler steps.
        seed: Seed of the noise.
        batch_size: Number of texts per call of the U-Net.

    Returns:
        Scores in float32 on the CPU; 0 is the best possible score.

    Raises:
        PromptError: No text, or something that is none.
        ConfigError: No timestep, one outside the schedule, or a batch of no text.

    Source:
        Li et al. 2023 (Diffusion Classifier), arXiv:2303.16203, equation 6.
    """
    timesteps = wholes("timesteps", timesteps)
    batch_size = whole("batch_size", batch_size, least=1)
    texts = listed("texts", texts, error=PromptError)
    texts = match_batch(texts, len(texts))
    h, w = latents.shape[2:]
    errors = torch.zeros(len(latents), len(texts), dtype=torch.float32, device="cpu")
    with backbone.lock, torch.no_grad():
        embeds = backbone.embed(texts, size=(h * backbone.reduction, w * backbone.reduction))
        for timestep in timesteps:
            noise = shared_noise((latents.shape[1], h, w), seed=seed, timestep=timestep)
            noisy_latents = add_noise(backbone.scheduler, latents, noise, timestep)
            for image, noisy in enumerate(noisy_latents):
                for start in range(0, len(texts), batch_size):
                    part = embeds.select(start, start + batch_size)
                    rows = noisy.expand(len(part), -1, -1, -1)
                    error = predict_noise(backbone, rows, timestep, part).cpu() - noise
                    errors[image, start : start + batch_size] += reduce(
                        error**2, "b c h w -> b", "mean"
                    )
    require_finite(errors, "scores", "load the model with dtype=torch.bfloat16 or torch.float32")
    return -errors / len(timesteps)
