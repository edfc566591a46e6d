"""Work that does not depend on the machine: calls of each part, and their arithmetic."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffenc.denoiser.attention import cross_attention_layers
from diffenc.denoiser.hooks import AllTapsRead
from diffenc.denoiser.shortening import shortened
from diffenc.models import describe
from diffenc.models.building import build_on_meta
from diffenc.runtime.threads import for_this_thread


@dataclass(slots=True)
class Counts:
    """How often the parts of a model ran.

    Attributes:
        unet_rows: Rows of its batches: one per picture, half, timestep and draw; what texts have in
            common may have run for fewer.
        vae_pictures: Pictures that were encoded.
        texts: Texts that were encoded, by the first encoder where there are two.
    """

    unet_rows: int = 0
    vae_pictures: int = 0
    texts: int = 0

    def to_dict(self) -> dict[str, int]:
        """As JSON holds it."""
        return asdict(self)


@contextmanager
def counted(parts: Mapping[str, nn.Module]) -> Iterator[Counts]:
    """Count what runs while the block is open; compiled code is not seen.

    Args:
        parts: "unet", "vae" and "text_encoder".
    """
    counts = Counts()

    # A truncated U-Net shares its middle with the whole; what comes before may run once for all.
    places = {
        "unet_rows": parts["unet"].mid_block,
        "vae_pictures": parts["vae"].encoder,
        "texts": parts["text_encoder"],
    }

    def add(field: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        setattr(counts, field, getattr(counts, field) + len(args[0]))

    with ExitStack() as stack:
        for field, place in places.items():
            # A hook of the library's own: any other could change results, and caches would end.
            hook = for_this_thread(partial(add, field))
            stack.callback(place.register_forward_pre_hook(hook).remove)  # type: ignore[union-attr]
        yield counts


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Floating point operations of one row of each part; a multiplication and an addition are two.

    Attributes:
        unet: A whole pass.
        unet_exit: A pass that ends after the last tap.
        vae: Encoding a picture.
        text: Encoding a text, with all text encoders.
    """

    unet: int
    unet_exit: int
    vae: int
    text: int

    def total(self, counts: Counts, *, exits: bool) -> int:
        """Of all that was counted.

        Args:
            counts: From `counted`.
            exits: Passes end after the last tap.
        """
        passes = self.unet_exit if exits else self.unet
        vae, text = counts.vae_pictures * self.vae, counts.texts * self.text
        return counts.unet_rows * passes + vae + text


@cache
def arithmetic(folder: str | Path, taps: tuple[str, ...], size: int) -> Arithmetic:
    """Counted on the meta device, from the configs of a folder.

    Args:
        folder: A diffusers folder or an alias; no weights are read.
        taps: Module paths.
        size: Side of the pictures, in pixels.
    """
    model = MetaModel(folder, size)
    return model.arithmetic(partial(model.run, shortened(model.unet, taps)))


@cache
def score_arithmetic(folder: str | Path, size: int) -> Arithmetic:
    """As `arithmetic`, of passes that end at the keys of the last cross-attention.

    Args:
        folder: A diffusers folder or an alias; no weights are read.
        size: Side of the pictures, in pixels.
    """
    model = MetaModel(folder, size)
    last = cross_attention_layers(model.unet)[-1]

    def leave(*_: Any) -> None:
        raise AllTapsRead

    def run() -> None:
        handle = model.unet.get_submodule(f"{last}.to_k").register_forward_hook(leave)
        with suppress(AllTapsRead):
            model.run(model.unet)
        handle.remove()

    return model.arithmetic(run)


class MetaModel:
    """The parts of a folder without weights, and inputs of one row.

    Args:
        folder: A diffusers folder or an alias; no weights are read.
        size: Side of the pictures, in pixels.
    """

    def __init__(self, folder: str | Path, size: int) -> None:
        told = describe(folder)
        side = size // told.reduction
        parts = build_on_meta(told)
        self.unet, self.vae, *self.texts = parts.values()
        with torch.device("meta"):
            width = sum(text.config.hidden_size for text in self.texts)
            pooled = self.texts[-1].config.projection_dim
            self.added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
            latents = torch.empty(1, self.unet.config.in_channels, side, side)
            step = torch.empty((), dtype=torch.long)
            self.inputs = (latents, step, torch.empty(1, 77, width))
            self.pixel_values = torch.empty(1, 3, size, size)
            self.ids = torch.zeros(1, 77, dtype=torch.long)

    def run(self, unet: nn.Module) -> None:
        """Call the U-Net, or a part of it, with one row."""
        unet(*self.inputs, added_cond_kwargs=self.added)

    def arithmetic(self, exits: Callable[[], None]) -> Arithmetic:
        """Operations of each part, and of a pass that `exits` makes."""
        return Arithmetic(
            unet=operations(lambda: self.run(self.unet)),
            unet_exit=operations(exits),
            vae=operations(lambda: self.vae.encode(self.pixel_values)),
            text=operations(lambda: [text(self.ids) for text in self.texts]),
        )


def operations(call: Callable[[], Any]) -> int:
    """Floating point operations of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return int(counter.get_total_flops())
