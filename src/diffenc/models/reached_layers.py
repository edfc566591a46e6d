"""Which linear layers and convolutions of a U-Net the tapped features depend on."""

from collections.abc import Sequence
from functools import cache
from json import dumps, loads
from typing import Any

import torch
from torch import nn

from diffenc.denoiser.hooks import ForwardTaps
from diffenc.denoiser.lora.options import PROJECTIONS
from diffenc.models.taps import LATENTS, meta_inputs
from diffenc.runtime.inference import lasting


def reached_layers(config: dict[str, Any], taps: Sequence[str]) -> frozenset[str]:
    """Paths of the linear layers and convolutions that get a gradient from features at the taps.

    A block that runs before the last tap may still lack one: behind a tap at `attn2.to_q` the keys
    and values of the same attention have no say. So the question is put to autograd, in a pass on
    the meta device: no weights, no memory, two seconds for SDXL, once.

    Args:
        config: A `UNet2DConditionModel` config as JSON holds it.
        taps: Module paths, or "latents".
    """
    names = tuple(sorted({tap for tap in taps if tap != LATENTS}))
    return _reached(dumps(config, sort_keys=True, default=str), names)


def reached_projections(config: dict[str, Any], taps: Sequence[str]) -> frozenset[str]:
    """Of `reached_layers` the projections of cross-attentions, see `diffenc.denoiser.lora.PROJECTIONS`."""
    endings = tuple(f".attn2.{part}" for part in PROJECTIONS)
    return frozenset(path for path in reached_layers(config, taps) if path.endswith(endings))


@cache
@lasting
def _reached(config: str, taps: tuple[str, ...]) -> frozenset[str]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(loads(config)).float().eval().requires_grad_(False)
    weights = {
        path: layer.weight.requires_grad_()
        for path, layer in unet.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    with torch.enable_grad(), ForwardTaps(unet, taps, early_exit=True) as reader:
        maps = reader.run(lambda: unet(**meta_inputs(unet.config, 64))) if taps else {}
        ends = [features.sum() for features in maps.values() if features.requires_grad]
    if not ends:
        return frozenset()
    gradients = torch.autograd.grad(ends, list(weights.values()), allow_unused=True)
    return frozenset(
        path for path, gradient in zip(weights, gradients, strict=True) if gradient is not None
    )
