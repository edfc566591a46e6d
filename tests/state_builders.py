"""A small backbone whose state is changed, what it is asked, and other weights for it."""

import copy

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

import builders
from diffenc.models.sd import StableDiffusion

TAPS = ("mid_block", "up_blocks.0.resnets.1")
SIZE = 16
TEXT = "a red circle left of a blue square"


def tiny_backbone() -> StableDiffusion:
    return StableDiffusion(
        name="tiny",
        unet=builders.tiny_unet(),
        vae=builders.tiny_vae(),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        text_encoder=builders.tiny_text_encoder(),
        tokenizer=builders.tiny_tokenizer(),
        default_taps=TAPS,
        default_size=SIZE,
    )


def picture(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, SIZE, SIZE, generator=generator) * 2 - 1


def stirred(module: nn.Module, amount: float = 0.05) -> nn.Module:
    """The same model with other weights."""
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * amount)
    return other.requires_grad_(False)
