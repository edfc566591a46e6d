"""Denoisers from their configs, and the arguments of a pass that has shapes alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffenc.denoiser.transformers import layout_of
from diffenc.inputs.prompts import PromptEmbeds

UNET = "UNet2DConditionModel"
"""Class of a denoiser whose config names none."""


def build_denoiser(config: Mapping[str, Any]) -> nn.Module:
    """A U-Net or a transformer on torch's default device, with the weights that its class draws.

    Args:
        config: Config of the denoiser; one that names no class is a `UNet2DConditionModel`'s.
    """
    import diffusers

    kind: Any = getattr(diffusers, str(config.get("_class_name", UNET)))
    values = {key: value for key, value in config.items() if key[:1] != "_"}
    denoiser: nn.Module = kind.from_config(values)
    return denoiser


def config_of(denoiser: Any) -> dict[str, Any]:
    """The config of a denoiser, with its class."""
    return {**dict(denoiser.config), "_class_name": type(denoiser).__name__}


def text_width(config: Mapping[str, Any]) -> int:
    """Channels of the text states that a denoiser reads.

    Args:
        config: Config of the denoiser, with its class.
    """
    layout = layout_of(config)
    width = config["cross_attention_dim" if layout is None else layout.text_width]
    return int(width if isinstance(width, int) else width[0])


def pooled_width(config: Mapping[str, Any]) -> int | None:
    """Channels of the pooled text that a denoiser reads; None where it reads none.

    Args:
        config: Config of the denoiser, with its class.
    """
    layout = layout_of(config)
    if layout is not None:
        return None if layout.pooled_width is None else int(config[layout.pooled_width])
    if config.get("addition_embed_type") != "text_time":
        return None
    time_ids = 6 * int(config["addition_time_embed_dim"])
    return int(config["projection_class_embeddings_input_dim"]) - time_ids


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latents that a denoiser reads.

    Args:
        config: Config of the denoiser, with its class.
    """
    layout = layout_of(config)
    return int(config["in_channels"]) // (1 if layout is None else layout.packing**2)


def patch_of(config: Mapping[str, Any]) -> int:
    """Latent cells that both sides of a denoiser's input must be a multiple of.

    Args:
        config: Config of the denoiser, with its class.
    """
    layout = layout_of(config)
    return 1 if layout is None else int(config["patch_size"]) * layout.packing


def probed_side(config: Mapping[str, Any]) -> int:
    """Side of latents that show a denoiser's shapes: few cells for a transformer.

    Args:
        config: Config of the denoiser, with its class.
    """
    return 64 if layout_of(config) is None else 4 * patch_of(config)


def meta_inputs(config: Mapping[str, Any], side: int, *, length: int = 4) -> dict[str, Any]:
    """Arguments of a float32 denoiser's forward pass without values, for latents of this side.

    Args:
        config: Config of the denoiser, with its class.
        side: Height and width of the latents.
        length: Number of text states.
    """
    place: dict[str, Any] = {"dtype": torch.float32, "device": "meta"}
    latents = torch.empty(1, latent_channels(config), side, side, **place)
    timesteps = torch.empty((), dtype=torch.long, device="meta")
    states = torch.empty(1, length, text_width(config), **place)
    width = pooled_width(config)
    pooled = None if width is None else torch.empty(1, width, **place)
    if (layout := layout_of(config)) is not None:
        return layout.arguments(config, latents, timesteps, PromptEmbeds(states, pooled))
    inputs: dict[str, Any] = {
        "sample": latents,
        "timestep": timesteps,
        "encoder_hidden_states": states,
    }
    if pooled is not None:
        inputs["added_cond_kwargs"] = {
            "text_embeds": pooled,
            "time_ids": torch.empty(1, 6, **place),
        }
    return inputs
