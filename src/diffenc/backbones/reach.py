"""Which linear layers of cross-attentions the tapped features depend on."""

from collections.abc import Sequence
from functools import cache
from json import dumps, loads
from typing import Any

import torch

from diffenc.attention import cross_attention_layers
from diffenc.backbones.taps import LATENTS, meta_inputs
from diffenc.hooks import ForwardTaps
from diffenc.lora.options import PROJECTIONS


def reached_projections(config: dict[str, Any], taps: Sequence[str]) -> frozenset[str]:
    """Paths of the projections of cross-attentions that get a gradient from features at the taps.

    A block that runs before the last tap may still lack one: behind a tap at `attn2.to_q` the keys
    and values of the same attention have no say. So the question is put to autograd, in a pass on
    the meta device: no weights, no memory, two seconds for SDXL, once.

    Args:
        config: A `UNet2DConditionModel` config as JSON holds it.
        taps: Module paths, or "latents".
    """
    names = tuple(sorted({tap for tap in taps if tap != LATENTS}))
    return _reached(dumps(config, sort_keys=True, default=str), names)


@cache
def _reached(config: str, taps: tuple[str, ...]) -> frozenset[str]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(loads(config)).eval().requires_grad_(False)
    paths = [f"{path}.{part}" for path in cross_attention_layers(unet) for part in PROJECTIONS]
    weights = [unet.get_submodule(path).weight.requires_grad_() for path in paths]
    with torch.enable_grad(), ForwardTaps(unet, taps, early_exit=True) as reader:
        maps = reader.run(lambda: unet(**meta_inputs(unet.config, 64))) if taps else {}
        ends = [features.sum() for features in maps.values() if features.requires_grad]
    if not ends:
        return frozenset()
    gradients = torch.autograd.grad(ends, weights, allow_unused=True)
    return frozenset(
        path for path, gradient in zip(paths, gradients, strict=True) if gradient is not None
    )
