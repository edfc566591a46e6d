"""Tokens that the words of a question gather from the features of a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.config import check_choice
from diffenc.denoiser.attention import cross_attention_layers, match_layers
from diffenc.denoiser.gathering import (
    as_shares,
    change_map,
    gather,
    join_layers,
    join_words,
    most_telling,
    places,
)
from diffenc.errors import PromptError
from diffenc.features import Features
from diffenc.inputs.words import shared_positions, words_of
from diffenc.models.base import Backbone
from diffenc.models.reached_layers import reached_projections

REST = "<rest>"
"""Name of the token that what belongs to no word gathers."""

Spans = dict[str, tuple[int, ...]]
"""Positions of each word in a text; none for a word that the text does not have."""


@dataclass(frozen=True, eq=False)
class WordTokens:
    """One token for each word of each picture's text, gathered by the word's cross-attention.

    Attributes:
        tokens: Gathered features, all taps side by side as in `Features.tokens`, in the dtype of
            the features; zeros for absent words. (b words c), or (b t words c) for several
            timesteps.
        places: Centre (row, column) and spread (row, column) of each word's map, as fractions of
            the picture's sides, in float32; see `diffenc.denoiser.gathering.places`.
        maps: Map of each word that gathered, in float32: shares of the cells that sum to 1.
        mask: Mask of the words that there are.
        words: Word of each token, per picture; "" for an absent word and "<rest>" for the rest.
        features: Features of the same pass: `features.tokens(2)` are grid tokens that stand beside
            those of the words.
    """

    tokens: Float[Tensor, "b *t words c"]
    places: Float[Tensor, "b *t words 4"]
    maps: Float[Tensor, "b *t words h w"]
    mask: Bool[Tensor, "b words"]
    words: tuple[tuple[str, ...], ...]
    features: Features

    def __repr__(self) -> str:
        return f"WordTokens({tuple(self.tokens.shape)}, words={list(self.words)})"

    def with_places(self) -> Float[Tensor, "b *t words c_4"]:
        """Tokens with their places as four more channels, in the tokens' dtype."""
        return torch.cat([self.tokens, self.places.to(self.tokens.dtype)], dim=-1)

    def question_maps(
        self, kind: Literal["words", "change"] = "words"
    ) -> Float[Tensor, "b *t h w"]:
        """One map for a whole text: what of the picture it is about.

        Args:
            kind: What is drawn. "words" is the mean of the words' maps, weighted by their
                sharpness, so that "the" hardly counts; it sums to 1. "change" is how far the text
                moves the features, |f_c - f_u| as a share of the mean length of f_u, and needs a
                pass with both halves: conditioning "uncond", "cfg" or "concat".

        Raises:
            ConfigError: Another kind, or a pass without both halves.
        """
        check_choice("kind of question map", kind, ("words", "change"))
        if kind == "change":
            halves = (self.features.select("uncond"), self.features.select("cond"))
            leading = self.maps.shape[:-3]
            flat = [{tap: maps.flatten(0, -4) for tap, maps in half.items()} for half in halves]
            changes: Tensor = change_map(*flat).unflatten(0, leading)
            return changes
        words = [[word not in ("", REST) for word in own] for own in self.words]
        present = torch.tensor(words, device=self.maps.device)
        if self.maps.ndim == 5:
            present = present[:, None].expand(self.maps.shape[:3])
        return join_words(self.maps, present)


def word_layers(
    backbone: Backbone, taps: Sequence[str], layers: str | Sequence[str] | None
) -> tuple[str, ...]:
    """Cross-attentions that say where words are.

    Args:
        backbone: Model whose cross-attentions are meant.
        taps: Names of the taps: module paths of the U-Net, or "latents".
        layers: Module paths, see `diffenc.denoiser.attention.match_layers`. None takes those of the
            decoder that the taps depend on or lie in, so that the pass ends where it would without
            them; where there are none, those outside of the decoder, and else all.

    Raises:
        TapError: No cross-attention by that name.
    """
    known = cross_attention_layers(backbone.denoiser)
    if layers is not None:
        return match_layers(backbone.denoiser, layers)
    reached = reached_projections(dict(backbone.denoiser.config), taps)
    run = [
        layer
        for layer in known
        if f"{layer}.to_v" in reached or any(tap.startswith(f"{layer}.") for tap in taps)
    ]
    decoder = [layer for layer in run if layer.startswith("up_blocks")]
    return tuple(decoder or run or known)


def word_spans(
    tokenizers: Sequence[Any],
    texts: Sequence[str],
    words: Sequence[str] | None,
    *,
    windows: bool = False,
) -> list[Spans]:
    """Words of each text and their positions.

    Args:
        tokenizers: Tokenizers of the model.
        texts: Texts, one per picture.
        words: Words that are looked for in every text; None is every word of each that was not cut
            off.
        windows: Whether long texts are read in windows; otherwise they are cut.

    Raises:
        PromptError: A text without words, or a word that no text has.
    """
    spans: dict[str, Spans] = {}
    faults: dict[str, PromptError] = {}
    for text in dict.fromkeys(texts):
        spans[text] = {}
        for word in words_of(text, tokenizers[0]) if words is None else words:
            try:
                spans[text][word] = shared_positions(tokenizers, text, word, windows=windows)
            except PromptError as error:
                faults[word] = error
                if words is not None:
                    spans[text][word] = ()
    for word in words or ():
        if not any(of_text[word] for of_text in spans.values()):
            raise faults[word]
    return [spans[text] for text in texts]


def positions_of(spans: Sequence[Spans]) -> tuple[int, ...]:
    """Positions of all words of all texts, in ascending order."""
    return tuple(sorted(set(chain.from_iterable(chain(*(each.values() for each in spans))))))


def gather_words(
    features: Features,
    attention: Sequence[Float[Tensor, "b *t tokens _h _w"]],
    spans: Sequence[Spans],
    *,
    count: int | None = None,
    power: float = 1.0,
    rest: bool = False,
) -> WordTokens:
    """Gather features by words.

    Args:
        features: Features of the pass.
        attention: Maps of the tokens at `positions_of(spans)`, at each cross-attention.
        spans: Words of each picture's text and their positions.
        count: Number of words per picture: those of `most_telling` where there are more, absent
            ones where there are fewer; None keeps all.
        power: Exponent of the maps; above 1 peaks count for more.
        rest: Whether a last token is gathered by the attention that the words do not get.
    """
    leading = attention[0].shape[:-3]
    widest = max(map(len, spans))
    words = [[*own, *[""] * (widest - len(own))] for own in spans]
    mask = torch.tensor(
        [[bool(own.get(word)) for word in row] for own, row in zip(spans, words, strict=True)],
        device=attention[0].device,
    )
    positions = positions_of(spans)
    repeats = leading[1] if len(leading) == 2 else 1
    per_row = [own for own in spans for _ in range(repeats)]
    layers = [_word_maps(maps.flatten(0, -4), per_row, positions, widest) for maps in attention]
    joined = as_shares(join_layers(layers), power).unflatten(0, leading)
    shares, others = joined[..., :-1, :, :], joined[..., -1:, :, :]
    if count is not None:
        shares, mask, words = _chosen(shares, mask, words, count)
    words = [
        [word if there else "" for word, there in zip(own, row, strict=True)]
        for own, row in zip(words, mask.tolist(), strict=True)
    ]
    if rest:
        shares = torch.cat([shares, others], dim=-3)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        words = [[*own, REST] for own in words]
    flat = shares.flatten(0, -4)
    parts = [gather(maps.flatten(0, -4), flat) for maps in features.values()]
    return WordTokens(
        tokens=torch.cat(parts, dim=-1).unflatten(0, leading),
        places=places(shares),
        maps=shares,
        mask=mask,
        words=tuple(map(tuple, words)),
        features=features,
    )


def _word_maps(
    maps: Float[Tensor, "rows tokens h w"],
    spans: Sequence[Spans],
    positions: Sequence[int],
    width: int,
) -> Float[Tensor, "rows width_1 h w"]:
    """Attention of each row's words, the sum over their pieces; behind them what they leave."""
    index = {position: place for place, position in enumerate(positions)}
    chosen = maps.new_zeros(len(spans), width + 1, len(positions))
    for row, own in enumerate(spans):
        for word, span in enumerate(own.values()):
            for position in span:
                chosen[row, word, index[position]] = 1
    of_words = torch.einsum("rwt,rthv->rwhv", chosen, maps)
    covered = chosen.amax(dim=1)  # words may overlap, and a token counts once
    left = 1 - torch.einsum("rt,rthv->rhv", covered, maps)
    return torch.cat([of_words[:, :-1], left.clamp_min(0)[:, None]], dim=1)


def _chosen(
    shares: Float[Tensor, "b *t words h w"],
    mask: Bool[Tensor, "b words"],
    words: Sequence[Sequence[str]],
    count: int,
) -> tuple[Tensor, Tensor, list[list[str]]]:
    """The words of each picture that tell most, over all timesteps, in the order of the text."""
    over_steps = shares if shares.ndim == 4 else shares.mean(dim=1)
    kept = most_telling(over_steps, mask, count)
    order = (~kept).long().argsort(dim=1, stable=True)[:, :count]
    rows = torch.arange(len(order), device=order.device)[:, None]
    there = kept[rows, order]
    chosen = shares.movedim(-3, 1)[rows, order].movedim(1, -3)
    present = there if shares.ndim == 4 else there[:, None]
    chosen = chosen * present[..., None, None]
    names = [[own[place] for place in row] for own, row in zip(words, order.tolist(), strict=True)]
    missing = count - order.shape[1]
    if missing > 0:
        chosen = torch.nn.functional.pad(chosen, (0, 0, 0, 0, 0, missing))
        there = torch.nn.functional.pad(there, (0, missing))
        names = [[*own, *[""] * missing] for own in names]
    return chosen, there, names
