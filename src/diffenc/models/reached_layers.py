"""Which linear layers and convolutions of a U-Net the tapped features depend on."""

from collections.abc import Sequence
from functools import cache
from json import dumps, loads
from typing import Any

import torch
from torch import nn

from diffenc.denoiser.hooks import ForwardTaps
from diffenc.denoiser.lora.options import PROJECTIONS
from diffenc.denoiser.transformers import layout_of
from diffenc.models.denoisers import build_denoiser, config_of, meta_inputs, probed_side
from diffenc.models.taps import LATENTS
from diffenc.runtime.inference import lasting


def reached_layers(config: dict[str, Any], taps: Sequence[str]) -> frozenset[str]:
    """Paths of the linear layers and convolutions that get a gradient from features at the taps.

    A block that runs before the last tap may still lack one: behind a tap at `attn2.to_q` the keys
    and values of the same attention have no say. So the question is put to autograd, in a pass on
    the meta device: no weights, no memory, two seconds for SDXL, once.

    Args:
        config: Config of the denoiser, with its class where that is no `UNet2DConditionModel`.
        taps: Module paths, or "latents".
    """
    names = tuple(sorted({tap for tap in taps if tap != LATENTS}))
    return _reached(dumps(config, sort_keys=True, default=str), names)


def reached_projections(config: dict[str, Any], taps: Sequence[str]) -> frozenset[str]:
    """The `reached_layers` that are projections of the attentions in which texts have a say.

    See `diffenc.denoiser.lora.PROJECTIONS`.
    """
    layout = layout_of(config)
    attention = "attn2" if layout is None else layout.adapted
    endings = tuple(f".{attention}.{part}" for part in PROJECTIONS)
    return frozenset(path for path in reached_layers(config, taps) if path.endswith(endings))


@cache
@lasting
def _reached(config: str, taps: tuple[str, ...]) -> frozenset[str]:
    values = loads(config)
    with torch.device("meta"):
        denoiser = build_denoiser(values).float().eval().requires_grad_(False)
    weights = {
        path: layer.weight.requires_grad_()
        for path, layer in denoiser.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    known = config_of(denoiser)
    inputs = meta_inputs(known, probed_side(known))
    with torch.enable_grad(), ForwardTaps(denoiser, taps, early_exit=True) as reader:
        maps = reader.run(lambda: denoiser(**inputs)) if taps else {}
        ends = [features.sum() for features in maps.values() if features.requires_grad]
    if not ends:
        return frozenset()
    gradients = torch.autograd.grad(ends, list(weights.values()), allow_unused=True)
    return frozenset(
        path for path, gradient in zip(weights, gradients, strict=True) if gradient is not None
    )
