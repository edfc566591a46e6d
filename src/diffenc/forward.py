"""The only place that calls the U-Net."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc.attention import CrossAttnTaps
from diffenc.backbones.base import Backbone
from diffenc.errors import ConfigError
from diffenc.hooks import ForwardTaps
from diffenc.prompts import PromptEmbeds


def read_taps(
    backbone: Backbone,
    noisy_latents: Float[Tensor, "b c h w"],
    timestep: int,
    prompts: Sequence[PromptEmbeds],
    taps: Sequence[str],
) -> list[dict[str, Float[Tensor, "b _c _h _w"]]]:
    """Read features under one or several texts with one call of the U-Net.

    All texts are fused into one batch; for unconditional and conditional features its order is
    [uncond, cond], as in diffusers. The call ends after the last tap.

    Args:
        backbone: Whose U-Net is called, in its dtype and on its device.
        noisy_latents: At the noise level of `timestep`; the same for every text.
        timestep: Scheduler step.
        prompts: Each holds one row for all latents, or one per latent.
        taps: Module paths.

    Returns:
        For each of `prompts` a map per tap, in the order of `taps`, none sharing memory.
    """
    batch = len(noisy_latents)
    texts = PromptEmbeds.concat([part.rows(batch) for part in prompts])
    texts = texts.to(backbone.device, backbone.dtype)
    sample = noisy_latents.to(backbone.device, backbone.dtype).repeat(len(prompts), 1, 1, 1)
    step = torch.tensor(timestep, device=backbone.device)
    with backbone.lock, ForwardTaps(backbone.unet, taps, early_exit=True) as reader:
        maps = reader.run(
            lambda: backbone.unet(sample, step, return_dict=False, **texts.unet_kwargs())
        )
    parts = {name: features.split(batch) for name, features in maps.items()}
    return [
        {name: halves[index].clone() for name, halves in parts.items()}
        for index in range(len(prompts))
    ]


def predict_noise(
    backbone: Backbone,
    noisy_latents: Float[Tensor, "b c h w"],
    timestep: int,
    prompt_embeds: PromptEmbeds,
) -> Float[Tensor, "b c h w"]:
    """The noise that the U-Net sees in latents under a text, in float32, without guidance.

    Args:
        backbone: Whose U-Net is called; one that predicts v or the clean latents is converted.
        noisy_latents: At the noise level of `timestep`.
        timestep: Scheduler step.
        prompt_embeds: One row for all latents, or one per latent.

    Raises:
        ConfigError: The model predicts something else.

    Source:
        Salimans and Ho 2022 (v-prediction), arXiv:2202.00512, appendix D.
    """
    with backbone.lock:
        output: Tensor = _call_unet(backbone, noisy_latents, timestep, prompt_embeds).float()
    noisy = noisy_latents.to(output)
    signal = float(backbone.scheduler.alphas_cumprod[timestep])
    of_image, of_noise = math.sqrt(signal), math.sqrt(1 - signal)
    match backbone.prediction_type:
        case "epsilon":
            return output
        case "v_prediction":
            return of_image * output + of_noise * noisy
        case "sample":
            return (noisy - of_image * output) / of_noise
    raise ConfigError(
        f"cannot derive noise from a model that predicts {backbone.prediction_type!r}; it must be "
        "'epsilon', 'v_prediction' or 'sample'"
    )


def read_attention(
    backbone: Backbone,
    noisy_latents: Float[Tensor, "b c h w"],
    timestep: int,
    prompt_embeds: PromptEmbeds,
    positions: Sequence[int],
    layers: Sequence[str] | None = None,
) -> dict[str, Float[Tensor, "b tokens _h _w"]]:
    """Read how much each cell attends to some tokens of a text, with one call of the U-Net.

    Args:
        backbone: Whose U-Net is called, in its dtype and on its device.
        noisy_latents: At the noise level of `timestep`.
        timestep: Scheduler step.
        prompt_embeds: One row for all latents, or one per latent.
        positions: Of the tokens, see `diffenc.attention.word_token_positions`.
        layers: See `diffenc.attention.CrossAttnTaps`.

    Returns:
        Per layer a probability per cell and token, mean over heads, in float32.

    Raises:
        TapError: No cross-attention by that name.
        ShapeError: A position that the text does not have.
    """
    with (
        backbone.lock,
        torch.no_grad(),
        CrossAttnTaps(backbone.unet, layers, tokens=positions) as reader,
    ):
        _call_unet(backbone, noisy_latents, timestep, prompt_embeds)
        return reader.maps()


def _call_unet(
    backbone: Backbone, noisy_latents: Tensor, timestep: int, prompt_embeds: PromptEmbeds
) -> Tensor:
    device, dtype = backbone.device, backbone.dtype
    output: Tensor = backbone.unet(
        noisy_latents.to(device, dtype),
        torch.tensor(timestep, device=device),
        return_dict=False,
        **prompt_embeds.rows(len(noisy_latents)).to(device, dtype).unet_kwargs(),
    )[0]
    return output
