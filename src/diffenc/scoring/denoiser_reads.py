"""Passes of the U-Net that scores are made of: attention statistics, predicted noise, queries."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffenc.denoiser.attention_scores import Pooling, read_queries, read_scores
from diffenc.inputs.noise import to_noise
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.models.base import Backbone
from diffenc.passes.forward import check_whole
from diffenc.passes.reuse import Reuse


def read_statistics(
    backbone: Backbone,
    noisy_latents: Float[Tensor, "rows c h w"],
    timesteps: Int[Tensor, " rows"],
    prompt_embeds: PromptEmbeds,
    attentions: Mapping[str, Any],
    pooling: Pooling,
    *,
    mask: Bool[Tensor, "rows l"] | None = None,
    predict: bool,
    reuse: Reuse | None = None,
) -> tuple[Float[Tensor, "rows layers"] | None, Float[Tensor, "rows c h w"] | None]:
    """Read what scores are made of, with one call of the U-Net for all rows.

    Args:
        backbone: Model whose U-Net is called, in its dtype and on its device.
        noisy_latents: Noisy latents, each at the noise level of its timestep.
        timesteps: Scheduler steps, one per row.
        prompt_embeds: Encoded texts, one row per row of latents.
        attentions: Cross-attentions to score by, by module path; may be empty.
        pooling: Way in which the products of queries and keys are pooled.
        mask: Mask of the tokens that count, per row; None counts all.
        predict: Whether the noise is predicted too; otherwise the pass ends at the last attention.
        reuse: Outputs that rows have in common, which are not computed for each; None computes
            everything.

    Returns:
        Attention scores per layer, and the predicted noise, in float32; None where not asked for.

    Raises:
        TapError: A layer did not run.
        ConfigError: A U-Net that predicts no noise, see `diffenc.passes.forward.predict_noise`.
    """
    if predict:
        check_whole(backbone)
    output: list[Tensor] = []

    rows = (noisy_latents, timesteps, prompt_embeds)
    scores = None
    with backbone.lock, torch.no_grad():
        denoiser = None if reuse is None else reuse.denoiser(backbone, *rows)

        def call() -> None:
            output[:] = backbone.denoise(*rows, run=denoiser)

        if attentions:
            scores = read_scores(attentions, pooling, call, mask=mask, early_exit=not predict)
        else:
            call()
    if not predict:
        return scores, None
    noise = to_noise(
        backbone.scheduler,
        backbone.prediction_type,
        output[0].float(),
        noisy_latents,
        timesteps,
    )
    return scores, noise


def read_late_queries(
    backbone: Backbone,
    noisy_latents: Float[Tensor, "rows c h w"],
    timesteps: Int[Tensor, " rows"],
    prompt_embeds: PromptEmbeds,
    attentions: Mapping[str, Any],
) -> dict[str, Float[Tensor, "rows _n _c"]]:
    """Queries of cross-attentions, with one call of the U-Net that ends at the last of them.

    Args:
        backbone: Model whose U-Net is called, in its dtype and on its device.
        noisy_latents: Noisy latents, each at the noise level of its timestep.
        timesteps: Scheduler steps, one per row.
        prompt_embeds: Encoded texts: one row for all latents, or one for each.
        attentions: Cross-attentions whose queries are read, by module path.

    Raises:
        TapError: A layer did not run.
    """
    call = partial(backbone.denoise, noisy_latents, timesteps, prompt_embeds)
    with backbone.lock, torch.no_grad():
        return read_queries(attentions, call)
