"""Whether the parts of a model belong together."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffenc.denoiser.lora.adapters import active_lora, is_merged, require_separate
from diffenc.denoiser.transformers import layout_of, word_for
from diffenc.errors import BackboneError, ConfigError
from diffenc.inputs.noise import is_flow, signal_levels
from diffenc.models.denoisers import config_of, text_width
from diffenc.models.schedules import check_schedule
from diffenc.models.variants import check_channels, check_vae

STORED = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""Types of numbers that weights may have, and what safetensors files call them."""


def is_deep(vae: Any) -> bool:
    """Whether an autoencoder is a deep compression one (`AutoencoderDC`)."""
    return hasattr(getattr(vae, "config", None), "encoder_qkv_multiscales")


def check_components(denoiser: Any, vae: Any, scheduler: Any, *, flow: bool = False) -> None:
    """Raise a `BackboneError` that says which two of these do not fit each other, and why.

    Args:
        denoiser: U-Net or transformer.
        vae: Autoencoder.
        scheduler: Holder of the noise schedule.
        flow: Whether models of the family match flows.
    """
    layout = layout_of(denoiser)
    own = "unet" if layout is None else "transformer"
    fields = ("in_channels", "cross_attention_dim") if layout is None else layout.needed
    widths = "encoder_block_out_channels" if is_deep(vae) else "block_out_channels"
    for name, part, needed in (
        (own, denoiser, fields),
        ("vae", vae, ("latent_channels", widths, "scaling_factor")),
    ):
        config = getattr(part, "config", None)
        if lacking := [key for key in needed if not hasattr(config, key)]:
            raise BackboneError(
                f"{name} is a {type(part).__name__} whose config lacks {lacking}; pass a model of "
                "diffusers"
            )
    if flow != is_flow(scheduler) or not (flow or hasattr(scheduler, "alphas_cumprod")):
        raise BackboneError(
            f"scheduler is a {type(scheduler).__name__}, "
            + (
                "and this model matches flows; pass a FlowMatchEulerDiscreteScheduler"
                if flow
                else "without alphas_cumprod; pass one of diffusers' that counts steps of noise, "
                "such as DDPMScheduler"
            )
        )
    check_schedule(scheduler, flow=flow)
    try:
        signal_levels(scheduler)
    except ConfigError as error:
        raise BackboneError(str(error)) from None
    check_weights(denoiser, f"the {word_for(denoiser)}")
    check_weights(vae, "the VAE")
    check_vae(vae.config, "this model")
    check_channels(config_of(denoiser), vae.config, "this model")


def check_weights(module: Any, what: str) -> None:
    """Raise a `BackboneError` where weights are stored in a kind that must not be cast silently."""
    if isinstance(module, nn.Module):
        kinds = {
            name: STORED.get(each.dtype, str(each.dtype))
            for name, each in module.named_parameters()
        }
        check_kinds(kinds, what)


def check_kinds(kinds: Mapping[str, str], what: str) -> None:
    """Raise a `BackboneError` where weights are quantised, whole numbers or truth values.

    Args:
        kinds: Type of the numbers of each weight, as safetensors files name it.
        what: Name of the weights, for messages.
    """
    known = STORED.values()
    if wrong := [name for name, kind in kinds.items() if kind not in known]:
        raise BackboneError(_quantised(wrong, kinds[wrong[0]], what))


def _quantised(names: Sequence[str], kind: str, what: str) -> str:
    return (
        f"{len(names)} weights of {what} are in {kind}, {names[0]!r} among them; diffenc reads "
        "float32, float64, bfloat16 and float16, and would lose the scales of quantised weights. "
        "Pass the model before it was quantised, or dequantise it first"
    )


def check_width(denoiser: Any, encoders: Sequence[Any]) -> None:
    """Raise a `BackboneError` unless text encoders give states of the width that is read."""
    width = sum(encoder.config.hidden_size for encoder in encoders)
    expected = text_width(config_of(denoiser))
    if width != expected:
        raise BackboneError(
            f"the text encoders give states of width {width} and the {word_for(denoiser)} takes "
            f"{expected}; they belong to different models"
        )


def check_text(denoiser: Any, *towers: tuple[Any, Any]) -> None:
    """Raise a `BackboneError` unless tokenizers, text encoders and the denoiser fit each other.

    Args:
        denoiser: Denoiser that reads the states of all encoders side by side.
        towers: Tokenizer and text encoder, for each.
    """
    check_width(denoiser, [encoder for _, encoder in towers])
    for tokenizer, encoder in towers:
        check_encoder(tokenizer, encoder)


def check_encoder(tokenizer: Any, encoder: Any) -> None:
    """Raise a `BackboneError` unless a text encoder knows every token of its tokenizer."""
    check_weights(encoder, "the text encoder")
    if len(tokenizer) > encoder.config.vocab_size:
        raise BackboneError(
            f"the tokenizer knows {len(tokenizer)} tokens and the text encoder "
            f"{encoder.config.vocab_size}; they belong to different models"
        )


def check_adapters(unet: Any, name: str) -> None:
    """Raise a `ConfigError` where something was done to a U-Net that calls would pass by.

    Args:
        unet: The U-Net.
        name: Name of the model, for messages.
    """
    kind = unet.config.get("encoder_hid_dim_type", None)
    if kind is not None:
        raise ConfigError(
            f"the U-Net of {name!r} has an adapter that reads pictures "
            f"(encoder_hid_dim_type={kind!r}), which it is not given here; call "
            "unload_ip_adapter() of the pipeline first"
        )
    fused = getattr(unet, "original_attn_processors", None) is not None
    if fused and active_lora(unet) is not None and not is_merged(unet):
        require_separate(unet)
