"""Tokens that the words of a question gather from the features of a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.denoiser.attention import cross_attention_layers, match_layers, nearest_layers
from diffenc.denoiser.gathering import gather, places, sharpest
from diffenc.denoiser.grids import to_grid
from diffenc.errors import PromptError
from diffenc.inputs.words import shared_positions, words_of
from diffenc.models.base import Backbone
from diffenc.models.taps import LATENTS


@dataclass(frozen=True, eq=False)
class WordTokens:
    """One token for each word of each picture's text, gathered by the word's cross-attention.

    Attributes:
        tokens: Gathered features, all taps side by side as in the grid's tokens; zeros where a
            picture's text has fewer words. (b words c), or (b t words c) for several timesteps.
        places: Centre (row, column) and spread (row, column) of each word's map, as shares of the
            picture's sides, in float32; see `diffenc.denoiser.gathering.places`.
        mask: Mask of the words that there are.
        words: Words of each picture's text, in the order of the tokens.
        maps: Map of each word, on the finest grid of the cross-attentions, in float32: the share of
            each cell's attention that the word gets.
    """

    tokens: Float[Tensor, "b *t words c"]
    places: Float[Tensor, "b *t words 4"]
    mask: Bool[Tensor, "b words"]
    words: tuple[tuple[str, ...], ...]
    maps: Float[Tensor, "b *t words h w"]

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        return f"WordTokens({tuple(self.tokens.shape)}, words={list(self.words)})"

    def with_places(self) -> Float[Tensor, "b *t words c_4"]:
        """Tokens with their places as four more channels."""
        return torch.cat([self.tokens, self.places.to(self.tokens.dtype)], dim=-1)

    def question_maps(self) -> Float[Tensor, "b *t h w"]:
        """One map for a whole text: the mean of its words' maps, each summing to 1."""
        shares = self.maps / self.maps.sum(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
        present = self.mask.to(shares.dtype)
        while present.ndim < shares.ndim - 2:
            present = present[:, None]
        total = (shares * present[..., None, None]).sum(dim=-3)
        joined: Tensor = total / present.sum(dim=-1).clamp_min(1)[..., None, None]
        return joined


def word_layers(
    backbone: Backbone, taps: Sequence[str], layers: str | Sequence[str] | None
) -> tuple[str, ...]:
    """Cross-attentions that say where words are: those asked for, else the nearest to the taps.

    Raises:
        TapError: No cross-attention by that name.
    """
    if layers is not None:
        return match_layers(backbone.denoiser, layers)
    known = cross_attention_layers(backbone.denoiser)
    near = {name for tap in taps if tap != LATENTS for name in nearest_layers(tap, known)}
    return tuple(name for name in known if name in near) or known


def word_positions(
    tokenizers: Sequence[Any], texts: Sequence[str], words: Sequence[str] | None
) -> list[dict[str, tuple[int, ...]]]:
    """Words of each text and their positions; those that were cut off are left out.

    Args:
        tokenizers: Tokenizers of the model.
        texts: Texts, one per picture.
        words: Words that are looked for in every text; None is every word of each.

    Raises:
        PromptError: A text without words, or one that has none of `words`.
    """
    found = {}
    for text in dict.fromkeys(texts):
        positions: dict[str, tuple[int, ...]] = {}
        fault: PromptError | None = None
        for word in words_of(text, tokenizers[0]) if words is None else words:
            try:
                positions[word] = shared_positions(tokenizers, text, word)
            except PromptError as error:
                fault = error
        if not positions:
            raise fault or PromptError(f"the text {text!r} has no words to gather tokens by")
        found[text] = positions
    return [found[text] for text in texts]


def gather_words(
    features: Mapping[str, Float[Tensor, "b *t _c _h _w"]],
    attention: Sequence[Float[Tensor, "b *t tokens _h _w"]],
    positions: Sequence[Mapping[str, tuple[int, ...]]],
    *,
    count: int | None = None,
    power: float = 1.0,
    rest: bool = False,
) -> WordTokens:
    """Gather features by words.

    Args:
        features: Feature maps by tap.
        attention: Maps of all tokens of the texts, of each cross-attention.
        positions: Positions of the words of each picture's text.
        count: Number of words per picture, the sharpest where there are more; None keeps all.
        power: Exponent of the maps; above 1 peaks count for more.
        rest: Whether a last token is gathered by the start token, which the cells look at that no
            word describes.
    """
    leading = next(iter(features.values())).shape[:-3]
    finest = max((tuple(maps.shape[-2:]) for maps in attention), key=lambda size: size[0] * size[1])
    rows = [to_grid(maps.flatten(0, -4).float(), (finest[0], finest[1])) for maps in attention]
    per_token = torch.stack(rows).mean(dim=0).unflatten(0, leading)
    longest = max(map(len, positions))
    weights = per_token.new_zeros(*leading, longest + rest, *finest)
    mask = torch.zeros(leading[0], longest + rest, dtype=torch.bool, device=per_token.device)
    for row, of_text in enumerate(positions):
        for index, pieces in enumerate(of_text.values()):
            weights[row, ..., index, :, :] = per_token[row, ..., list(pieces), :, :].sum(dim=-3)
            mask[row, index] = True
    if rest:
        weights[..., -1, :, :], mask[:, -1] = per_token[..., 0, :, :], True
    words = [tuple(of_text) for of_text in positions]
    if count is not None and longest > count:
        weights, mask, words = _sharpest(weights, mask, words, count, rest)
    return _gathered(features, weights, mask, words, power)


def _gathered(
    features: Mapping[str, Tensor],
    weights: Tensor,
    mask: Tensor,
    words: Sequence[tuple[str, ...]],
    power: float,
) -> WordTokens:
    leading = weights.shape[:-3]
    flat = weights.flatten(0, -4)
    raised = flat if power == 1 else flat.pow(power)
    parts = [gather(maps.flatten(0, -4), raised) for maps in features.values()]
    return WordTokens(
        tokens=torch.cat(parts, dim=-1).unflatten(0, leading),
        places=places(flat).unflatten(0, leading),
        mask=mask,
        words=tuple(words),
        maps=weights,
    )


def _sharpest(
    weights: Tensor, mask: Tensor, words: Sequence[tuple[str, ...]], count: int, rest: bool
) -> tuple[Tensor, Tensor, list[tuple[str, ...]]]:
    """The sharpest words of each picture, by the mean over timesteps, in the order of the text."""
    last = weights.shape[-3] - rest
    over_steps = weights if weights.ndim == 4 else weights.mean(dim=1)
    kept = sharpest(over_steps[:, :last], mask[:, :last], count)
    order = (~kept).long().argsort(dim=1, stable=True)[:, :count]
    if rest:
        order = torch.cat([order, order.new_full((len(order), 1), last)], dim=1)
    rows = torch.arange(len(order), device=order.device)[:, None]
    chosen = weights.movedim(-3, 1)[rows, order].movedim(1, -3)
    there = torch.cat([kept, mask[:, last:]], dim=1)[rows, order]
    chosen = chosen * there.reshape(len(order), *[1] * (weights.ndim - 4), -1, 1, 1)
    left = [
        tuple(word for word, keep in zip(own, row.tolist(), strict=False) if keep)
        for own, row in zip(words, kept, strict=True)
    ]
    return chosen, there, left
