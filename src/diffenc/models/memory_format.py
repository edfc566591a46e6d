"""Memory format of convolutions: channels last where that was measured to be faster."""

import torch
from torch import nn

from diffenc.checks.arguments import flag
from diffenc.models.base import Backbone


def arrange(backbone: Backbone, channels_last: bool | None = None) -> Backbone:
    """Put the convolutions of VAE and U-Net into one memory format.

    Results agree within rounding. The format belongs to the weights: it survives `.to()`, copies
    and `load_state_dict`, and pictures and latents follow it inside.

    Args:
        backbone: Backbone that is changed in place, and returned.
        channels_last: Whether the convolutions of the VAE and the U-Net have channels last; None
            takes `DEFAULT`.
    """
    if channels_last is not None:
        channels_last = flag("channels_last", channels_last)
    formats = DEFAULT if channels_last is None else dict.fromkeys(DEFAULT, channels_last)
    for part, last in formats.items():
        module = backbone.vae if part == "vae" else backbone.denoiser
        set_format(module, channels_last=last)
    return backbone


DEFAULT = {"vae": True, "unet": False}
"""Whether convolutions have channels last. Measured at real size on a CPU, see the page on cost and
caching: the VAE gains in bfloat16 and in float32, the U-Net gains nothing in bfloat16."""


def set_format(module: nn.Module, *, channels_last: bool) -> None:
    """Lay out the weights of convolutions, (out in h w), with channels last or first."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            child.weight.data = child.weight.data.contiguous(memory_format=layout)
