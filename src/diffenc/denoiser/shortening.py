"""A U-Net that ends after the last place that is read.

The cut keeps diffusers' own forward pass: the up blocks behind the last tap are replaced by one
that has no parameters and hands its input on, and the output layers by the identity. Since that
block still says how many residuals it takes, sizes that divide unevenly come out as in the whole.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from diffenc.denoiser.transformers import layout_of, shortened_transformer
from diffenc.runtime.threads import share_lock

_UP_BLOCK = re.compile(r"up_blocks\.(\d+)(?:\.(resnets|attentions)\.(\d+))?")


class Passthrough(nn.Module):
    """Stands for the up blocks that are not run.

    Attributes:
        resnets: Placeholders; their number is how many residuals the U-Net sets aside.
    """

    def __init__(self, residuals: int) -> None:
        super().__init__()
        self.resnets = [None] * residuals

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """Its input."""
        return hidden_states


def shortened(unet: nn.Module, taps: Sequence[str]) -> nn.Module:
    """A U-Net that shares its modules with `unet` and runs nothing behind the last tap's layer.

    Whole blocks behind it go, and so do the layers behind it in its own block. Down blocks and the
    middle always stay: they come first. Of a diffusion transformer the blocks behind the tap's go.

    Args:
        unet: A `UNet2DConditionModel` or a diffusion transformer; it is left as it is.
        taps: Module paths that must still be there.
    """
    if (layout := layout_of(unet)) is not None:
        return shortened_transformer(unet, layout, taps, shallow_copy(unet))
    last_block, last_layer = _last(taps)
    blocks = list(unet.up_blocks)  # type: ignore[arg-type]
    kept = blocks[: last_block + 1]
    if kept and last_layer is not None:
        kept[-1] = _shortened_block(kept[-1], last_layer + 1)
    if len(kept) < len(blocks):
        kept.append(Passthrough(len(blocks[len(kept)].resnets)))
    short = shallow_copy(unet)
    short.up_blocks = nn.ModuleList(kept)
    short.conv_norm_out = None
    short.conv_out = nn.Identity()
    share_lock(short, unet)
    whole: nn.Module = short
    return whole


def is_whole(module: nn.Module) -> bool:
    """Whether a module gives what it gives in the U-Net that it was taken from."""
    return not (isinstance(module, Passthrough) or getattr(module, "is_shortened", False))


def ends_early(denoiser: Any) -> bool:
    """Whether a denoiser was shortened, and so predicts nothing."""
    last = denoiser.conv_out if layout_of(denoiser) is None else denoiser.proj_out
    return not hasattr(last, "weight")


def _last(taps: Sequence[str]) -> tuple[int, int | None]:
    """Index of the last up block that is needed (-1: none) and of its last layer (None: all)."""
    order = []
    for tap in taps:
        if match := _UP_BLOCK.match(tap):
            block, layer = int(match[1]), match[3]
            order.append((block, float("inf") if layer is None else int(layer)))
    if not order:
        return -1, None
    block, layer = max(order)
    return block, None if layer == float("inf") else int(layer)


def _shortened_block(block: nn.Module, layers: int) -> nn.Module:
    short = shallow_copy(block)
    short.resnets = nn.ModuleList(list(block.resnets)[:layers])  # type: ignore[arg-type]
    if hasattr(block, "attentions"):
        short.attentions = nn.ModuleList(list(block.attentions)[:layers])  # type: ignore[arg-type]
    short.upsamplers = None
    short.is_shortened = True
    kept: nn.Module = short
    return kept


def copy_ways(module: nn.Module, paths: Sequence[str]) -> dict[str, Any]:
    """Copies of a module and of the submodules on the ways to some, which share all others.

    Args:
        module: Module; it is left as it is.
        paths: Paths of submodules, which are copied too; "" is the module.

    Returns:
        Copies by path; "" is that of the whole.
    """
    copies: dict[str, Any] = {"": shallow_copy(module)}
    for path in paths:
        parts = path.split(".") if path else []
        for depth in range(1, len(parts) + 1):
            way = ".".join(parts[:depth])
            if way not in copies:
                parent = copies[".".join(parts[: depth - 1])]
                copies[way] = shallow_copy(parent.get_submodule(parts[depth - 1]))
                parent._modules[parts[depth - 1]] = copies[way]
    return copies


def shallow_copy(module: nn.Module) -> Any:
    """A copy that shares submodules and weights, with lists of submodules and hooks of its own."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    for name, value in vars(module).items():
        if "hooks" in name and isinstance(value, dict):
            setattr(twin, name, type(value)(value))
    return twin
