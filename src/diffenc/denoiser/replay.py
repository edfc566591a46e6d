"""A U-Net that takes the outputs of its first modules as they were recorded, and runs the rest.

What a text does not change, or what is taken from a pass without it, is computed once and serves
every text. The U-Net itself is left alone: what runs is a copy of the modules on the way, which
shares all others, so that other threads and later calls meet what they know.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from diffenc.denoiser.hooks import AllTapsRead
from diffenc.denoiser.shortening import copy_ways
from diffenc.runtime.threads import for_this_thread

Outputs = dict[str, tuple[Float[Tensor, "..."], ...]]
"""Outputs of modules by their paths: the maps that a down block hands on, or one tensor."""

_DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")


class Replayed(nn.Module):
    """Stands for a module whose output is known.

    Attributes:
        outputs: Maps that a down block hands on, of which the last is its own output, or one
            tensor.
    """

    def __init__(self, outputs: tuple[Tensor, ...], *, is_block: bool) -> None:
        super().__init__()
        self.outputs, self.is_block = outputs, is_block

    def forward(self, *_: Any, **__: Any) -> Any:
        """The known output, whatever is put in."""
        return (self.outputs[-1], self.outputs) if self.is_block else self.outputs[0]


def replayed(unet: nn.Module, outputs: Mapping[str, tuple[Tensor, ...]]) -> nn.Module:
    """A copy of a U-Net that shares its modules, with known outputs in place of some.

    Args:
        unet: A `UNet2DConditionModel`; it is left as it is.
        outputs: Outputs by module path, as `record` gives them, for as many rows as will be passed.
    """
    copies = copy_ways(unet, [path.rpartition(".")[0] for path in outputs])
    for path, values in outputs.items():
        parent, _, name = path.rpartition(".")
        copies[parent]._modules[name] = Replayed(values, is_block=_is_block(path))
    whole: nn.Module = copies[""]
    return whole


def record(unet: nn.Module, paths: Sequence[str], call: Callable[[], Any]) -> Outputs:
    """Outputs of modules in one call, which ends after the last of them.

    Args:
        unet: A `UNet2DConditionModel`.
        paths: Module paths in the order in which the modules run.
        call: Function that runs the U-Net.
    """
    outputs: Outputs = {}

    def keeper(path: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            outputs[path] = tuple(output[1]) if _is_block(path) else (output,)
            if len(outputs) == len(paths):
                raise AllTapsRead

        return for_this_thread(keep)

    with ExitStack() as stack:
        for path in paths:
            handle = unet.get_submodule(path).register_forward_hook(keeper(path))
            stack.callback(handle.remove)
        with suppress(AllTapsRead):
            call()
    return outputs


def output_counts(unet: nn.Module, paths: Sequence[str]) -> list[int]:
    """Number of tensors that `record` gives for each path."""
    modules: list[Any] = [unet.get_submodule(path) for path in paths]
    return [
        len(module.resnets) + (module.downsamplers is not None) if _is_block(path) else 1
        for path, module in zip(paths, modules, strict=True)
    ]


def text_free_prefix(unet: Any) -> tuple[str, ...]:
    """Modules before the first cross-attention whose outputs the rest reads.

    Beside them run only the timestep's embedding, norms and one projection, which cost next to
    nothing. In SDXL the pooled text is part of the timestep's embedding, and nothing but the first
    convolution is free of it.

    Args:
        unet: The denoiser; what is no U-Net of diffusers' usual blocks has no such modules.

    Returns:
        Module paths in the order in which the modules run; none where a text comes in earlier.
    """
    if not _has_usual_blocks(unet) or unet.config.addition_embed_type is not None:
        return ()
    index = next((i for i, b in enumerate(unet.down_blocks) if hasattr(b, "attentions")), None)
    if index is None:
        return ()
    first = unet.down_blocks[index].attentions[0].transformer_blocks[0]
    if first.only_cross_attention or first.attn2 is None:
        return ()
    block = f"down_blocks.{index}"
    before = [f"down_blocks.{earlier}" for earlier in range(index)]
    inside = [f"{block}.resnets.0", f"{block}.attentions.0.transformer_blocks.0.attn1"]
    paths = ["conv_in", *before, *inside]
    if any(is_hooked(unet.get_submodule(path)) for path in paths):
        return ()  # somebody reads or changes what every row gives there
    return replaceable(unet, paths)


def down_path(unet: Any, *, middle: bool = False) -> tuple[str, ...]:
    """Everything before the decoder: the first convolution and the down blocks.

    Args:
        unet: The denoiser.
        middle: Whether the middle block belongs to it.

    Returns:
        Module paths in the order in which the modules run; none where they cannot be replaced.
    """
    if not _has_usual_blocks(unet) or (middle and unet.mid_block is None):
        return ()
    blocks = [f"down_blocks.{index}" for index in range(len(unet.down_blocks))]
    return replaceable(unet, ["conv_in", *blocks, *(["mid_block"] if middle else [])])


def _is_block(path: str) -> bool:
    return path.startswith("down_blocks.") and path.count(".") == 1


def _has_usual_blocks(unet: Any) -> bool:
    blocks = getattr(unet, "down_blocks", ())
    return bool(blocks) and all(type(block).__name__ in _DOWN_BLOCKS for block in blocks)


def replaceable(unet: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """The paths, or none where the modules around them cannot be copied.

    Offloading and `Module.compile` put functions into a module that call the original.
    """
    ways = {way for path in paths for way in _ways(path)}
    around = [unet.get_submodule(way) for way in ways]
    if any("forward" in vars(each) or each._compiled_call_impl for each in around):
        return ()
    return tuple(paths)


def _ways(path: str) -> list[str]:
    """Paths of the modules around one, the whole among them."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody reads or changes what a module, or one in it, takes or gives."""
    return any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
