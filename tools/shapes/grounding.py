"""The loss that makes attention look at what words name, for scenes whose objects are known.

Without it, binding a word to a place takes a small U-Net far longer than a small machine has.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from diffenc.denoiser.grounding import share_outside
from diffenc.shapes.phrases import named_objects
from diffenc.shapes.scenes import Scene

GROUNDED_LAYERS = ("up_blocks.1", "up_blocks.2")
"""The decoder's finer levels, as in TokenCompose; all other layers are left to themselves."""


def spoken_of(
    tokenizer: CLIPTokenizer, text: str, scene: Scene, *, colors: bool = False
) -> list[int]:
    """Per token of the padded text a bit set of the scene's objects; 0 where it names none."""
    return bit_sets(tokenizer, text, lambda words: named_objects(scene, words, colors=colors))


def bit_sets(
    tokenizer: CLIPTokenizer,
    text: str,
    naming: Callable[[Sequence[str]], Sequence[Sequence[int]]],
) -> list[int]:
    """Per token of the padded text the objects that it names, as bits.

    The tokenizer of the scenes has a token for each of their words.
    """
    ids = tokenizer(text, padding="max_length", truncation=True).input_ids
    words = [piece.removesuffix("</w>") for piece in tokenizer.convert_ids_to_tokens(ids)]
    return [sum(1 << index for index in objects) for objects in naming(words)]


def outside(maps: Mapping[str, Tensor], shares: Tensor, bits: Tensor, weight: Tensor) -> Tensor:
    """Mean squared share of the words' attention that lies outside what they name.

    Args:
        maps: Per layer the attention (b tokens h w).
        shares: How much of each cell the objects cover (b objects h w), 0 to 1.
        bits: Per token its set of objects (b tokens).
        weight: Per row (b), 0 to 1.
    """
    objects = torch.arange(shares.shape[1])
    chosen = ((bits[:, :, None] >> objects) & 1).to(shares.dtype)
    masks = torch.einsum("bto,bohw->bthw", chosen, shares).clamp(max=1)
    return share_outside(maps, masks, (chosen.sum(dim=-1) > 0) * weight[:, None])
