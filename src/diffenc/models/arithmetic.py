"""Arithmetic of a pass of a denoiser, counted on the meta device without weights."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffenc.denoiser.transformers import layout_of
from diffenc.models.denoisers import build_denoiser, config_of, meta_inputs
from diffenc.models.family_files import FAMILY_FILES

TEXT_LENGTH = 77
"""Number of tokens of the text that a counted pass reads, CLIP's limit."""


def text_states(config: Mapping[str, Any]) -> int:
    """Number of text states that a counted pass reads.

    Where picture and text are joined, padding takes part: it is that of every text. Elsewhere it is
    `TEXT_LENGTH`, of which PixArt and Sana read no padding.

    Args:
        config: Config of the denoiser, with its class.
    """
    layout = layout_of(config)
    if layout is None or layout.cross_attention is not None:
        return TEXT_LENGTH
    files = next(
        each
        for each in FAMILY_FILES.values()
        if config["_class_name"] in each.classes[each.denoiser]
    )
    return sum(files.tokens_of(part, config) or TEXT_LENGTH for part in files.in_sequence)


def pass_operations(
    config: Mapping[str, Any], side: int, taps: Sequence[str] = ()
) -> tuple[int, dict[str, int]]:
    """Floating point operations of one row: of a whole pass, and of a pass that ends at each tap.

    A multiplication and an addition are two. Its text has `text_states` states.

    Args:
        config: Config of the denoiser, with its class.
        side: Height and width of the latents.
        taps: Module paths.

    Examples:
        >>> from diffenc.models import describe
        >>> config = describe("shapes").denoiser_config
        >>> whole, until = pass_operations(config, 16, ["mid_block", "up_blocks.1"])
        >>> until["mid_block"] < until["up_blocks.1"] < whole
        True
    """
    with torch.device("meta"):
        denoiser = build_denoiser(config).float().eval()
    inputs = meta_inputs(config_of(denoiser), side, length=text_states(config))
    until: dict[str, int] = {}
    with ExitStack() as stack, torch.no_grad():
        counter = stack.enter_context(FlopCounterMode(display=False))

        def note(tap: str, *_: Any) -> None:
            until.setdefault(tap, int(counter.get_total_flops()))

        for tap in taps:
            handle = denoiser.get_submodule(tap).register_forward_hook(partial(note, tap))
            stack.callback(handle.remove)
        denoiser(**inputs)
    return int(counter.get_total_flops()), until
