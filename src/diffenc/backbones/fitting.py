"""Whether the parts of a model belong together."""

from typing import Any

from diffenc.errors import BackboneError


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
    if vae.config.latent_channels != unet.config.in_channels:
        raise BackboneError(
            f"the VAE gives {vae.config.latent_channels} channels and the U-Net takes "
            f"{unet.config.in_channels}; they belong to different models"
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
        if len(tokenizer) > encoder.config.vocab_size:
            raise BackboneError(
                f"the tokenizer knows {len(tokenizer)} tokens and the text encoder "
                f"{encoder.config.vocab_size}; they belong to different models"
            )
