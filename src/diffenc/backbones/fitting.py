"""Whether the parts of a model belong together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffenc.errors import BackboneError, ConfigError
from diffenc.noise import noise_levels

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STORED = ("F16", "BF16", "F32", "F64")


def check_components(unet: Any, vae: Any, scheduler: Any) -> None:
    """Raise a `BackboneError` that says which two of these do not fit each other, and why."""
    for name, part, needed in (
        ("unet", unet, ("in_channels", "cross_attention_dim")),
        ("vae", vae, ("latent_channels", "block_out_channels", "scaling_factor")),
    ):
        config = getattr(part, "config", None)
        if lacking := [key for key in needed if not hasattr(config, key)]:
            raise BackboneError(
                f"{name} is a {type(part).__name__} whose config lacks {lacking}; pass a model of "
                "diffusers"
            )
    if not hasattr(scheduler, "alphas_cumprod"):
        raise BackboneError(
            f"scheduler is a {type(scheduler).__name__} without alphas_cumprod; pass one of "
            "diffusers' that counts steps of noise, such as DDPMScheduler"
        )
    try:
        noise_levels(scheduler)
    except ConfigError as error:
        raise BackboneError(str(error)) from None
    check_weights(unet, "the U-Net")
    check_weights(vae, "the VAE")
    if vae.config.latent_channels != unet.config.in_channels:
        raise BackboneError(
            f"the VAE gives {vae.config.latent_channels} channels and the U-Net takes "
            f"{unet.config.in_channels}; they belong to different models"
        )


def check_weights(module: Any, what: str) -> None:
    """Raise a `BackboneError` where weights are stored in a kind that must not be cast silently."""
    if isinstance(module, nn.Module):
        check_dtypes({name: each.dtype for name, each in module.named_parameters()}, what)


def check_stored(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Raise a `BackboneError` unless what is loaded into floating point weights is floating point.

    Args:
        state: Weights that will be cast.
        wanted: Weights of the model that they are for.
        what: Name of the weights, for messages.
    """
    check_dtypes(
        {
            name: value.dtype
            for name, value in state.items()
            if name in wanted and wanted[name].is_floating_point()
        },
        what,
    )


def check_dtypes(dtypes: Mapping[str, torch.dtype], what: str) -> None:
    """Raise a `BackboneError` where weights are quantised, whole numbers or truth values."""
    if wrong := [name for name, dtype in dtypes.items() if dtype not in _FLOATS]:
        raise BackboneError(_quantised(wrong, str(dtypes[wrong[0]]), what))


def check_files(folder: Path) -> None:
    """Raise a `BackboneError` where a part's files hold quantised weights, which loaders cast."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        except Exception:  # broken: whoever loads it says so
            continue
        wrong = [
            name
            for name, kind in kinds.items()
            if name.endswith((".weight", ".bias")) and kind not in _STORED
        ]
        if wrong:
            raise BackboneError(_quantised(wrong, str(kinds[wrong[0]]), str(file)))


def _quantised(names: Sequence[str], kind: str, what: str) -> str:
    return (
        f"{len(names)} weights of {what} are in {kind}, {names[0]!r} among them; diffenc reads "
        "float32, float64, bfloat16 and float16, and would lose the scales of quantised weights. "
        "Pass the model before it was quantised, or dequantise it first"
    )


def text_width(unet: Any) -> int:
    """Channels of the text states that a U-Net reads."""
    width = unet.config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])


def check_text(unet: Any, *towers: tuple[Any, Any]) -> None:
    """Raise a `BackboneError` unless tokenizers, text encoders and the U-Net fit each other.

    Args:
        unet: Reads the states of all encoders side by side.
        towers: Tokenizer and text encoder, for each.
    """
    width = sum(encoder.config.hidden_size for _, encoder in towers)
    wanted = text_width(unet)
    if width != wanted:
        raise BackboneError(
            f"the text encoders give states of width {width} and the U-Net takes {wanted}; they "
            "belong to different models"
        )
    for tokenizer, encoder in towers:
        check_weights(encoder, "the text encoder")
        if len(tokenizer) > encoder.config.vocab_size:
            raise BackboneError(
                f"the tokenizer knows {len(tokenizer)} tokens and the text encoder "
                f"{encoder.config.vocab_size}; they belong to different models"
            )
