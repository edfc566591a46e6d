"""Which objects a word of a text speaks of, and the loss that makes attention look at them.

After TokenCompose (Wang et al., CVPR 2024): beside denoising, the cross-attention map of a word is
asked to lie inside the mask of what it names. Without it, binding a word to a place takes a small
U-Net far longer than a small machine has.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from diffenc.shapes.captions import SIZE_WORDS
from diffenc.shapes.scenes import COLORS, SHAPES, Scene, Shape

GROUNDED_LAYERS = ("up_blocks.1", "up_blocks.2")
"""The decoder's finer levels, as in TokenCompose; all other layers are left to themselves."""
_NOUNS: dict[str, Shape | None] = {
    **{word: shape for shape in SHAPES for word in (shape, f"{shape}s")},
    "object": None,
    "objects": None,
}
_SIZES = {word: size for size, words in SIZE_WORDS.items() for word in words}


def spoken_of(
    tokenizer: CLIPTokenizer, text: str, scene: Scene, *, colors: bool = False
) -> list[int]:
    """Per token of the padded text a bit set of the scene's objects; 0 where it names none.

    A shape word, or "object", stands for the objects that have its shape and the colour and size of
    the words right before it. Size words are left alone, and so are colour words unless `colors`
    is on, where each stands for all objects of that colour. The text encoder is causal: "red" does
    not know whose colour it is, and can follow its mask only by looking for red.
    """
    ids = tokenizer(text, padding="max_length", truncation=True).input_ids
    words = [piece.removesuffix("</w>") for piece in tokenizer.convert_ids_to_tokens(ids)]
    bits = [0] * len(words)
    adjectives: list[int] = []
    for position, word in enumerate(words):
        if word in COLORS or word in _SIZES:
            adjectives.append(position)
            if colors and word in COLORS:
                alike = (i for i, thing in enumerate(scene.objects) if thing.color == word)
                bits[position] = sum(1 << index for index in alike)
            continue
        if word in _NOUNS and (colors or _NOUNS[word] is not None):
            named = {words[index] for index in adjectives}
            members = sum(
                1 << index
                for index, thing in enumerate(scene.objects)
                if _NOUNS[word] in (None, thing.shape)
                and all(w == thing.color or _SIZES.get(w) == thing.size for w in named)
            )
            bits[position] = members
        adjectives = []
    return bits


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
    spoken = (chosen.sum(dim=-1) > 0) * weight[:, None]
    total = shares.new_zeros(())
    for attention in maps.values():
        cells = F.adaptive_avg_pool2d(masks, (attention.shape[-2], attention.shape[-1]))
        inside = (attention * cells).sum(dim=(2, 3)) / attention.sum(dim=(2, 3)).clamp(min=1e-9)
        total = total + ((1 - inside).square() * spoken).sum() / spoken.sum().clamp(min=1e-6)
    return total / len(maps)
