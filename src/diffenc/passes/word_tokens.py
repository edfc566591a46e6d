"""Tokens that the words of a question gather from the features of a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from diffenc.checks.arguments import texts as checked_texts
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
from diffenc.errors import ConfigError, PromptError, TapError
from diffenc.features import Features
from diffenc.inputs.words import folded, shared_positions, words_of
from diffenc.models.base import Backbone
from diffenc.models.denoisers import config_of
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
        places: Centre (row, column) and spread (row, column) of each word's map, in float32; see
            `diffenc.denoiser.gathering.places`. They are fractions of the sides of what the model
            sees: the cut-out with resize="crop", and with "pad" the frame with its margins.
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
        self,
        kind: Literal["words", "change"] = "words",
        *,
        taps: str | Sequence[str] | None = None,
    ) -> Float[Tensor, "b *t h w"]:
        """One map for a whole text: what of the picture it is about.

        Args:
            kind: What is drawn. "words" is the mean of the words' maps, weighted by their
                sharpness, so that "the" hardly counts; it sums to 1, and is zeros for a text
                without words. "change" is how far the text moves the features, |f_c - f_u| as a
                share of the mean length of f_u, and needs a pass with both halves: conditioning
                "uncond", "cfg" or "concat".
            taps: Taps whose change is drawn, one or several, joined on the finest grid; coarse ones
                often change most. None is all of the pass. For "change" alone.

        Raises:
            ConfigError: Another kind, taps for "words", or a pass without both halves.
            TapError: A tap that the pass has not read.
        """
        check_choice("kind of question map", kind, ("words", "change"))
        if taps is not None and kind != "change":
            raise ConfigError('taps are for the question map "change": maps of words have layers')
        if kind == "change":
            try:
                halves = (self.features.select("uncond"), self.features.select("cond"))
            except ConfigError as error:
                raise ConfigError(
                    'the question map "change" is between the features with the text and without, '
                    'and this pass has one of them; call word_tokens(..., conditioning="cfg")'
                ) from error
            leading = self.maps.shape[:-3]
            chosen = halves[0] if taps is None else checked_texts("taps", taps, error=TapError)
            flat = [{tap: half[tap].flatten(0, -4) for tap in chosen} for half in halves]
            changes: Tensor = change_map(*flat).unflatten(0, leading)
            return changes
        words = [[word not in ("", REST) for word in own] for own in self.words]
        present = torch.tensor(words, dtype=torch.bool, device=self.maps.device)
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
    reached = reached_projections(config_of(backbone.denoiser), taps)
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
        PromptError: A text without words, or a word that no text has or that is named twice.
    """
    same = [folded(word) for word in words or ()]
    if twice := [word for word in words or () if same.count(folded(word)) > 1]:
        raise PromptError(f"words names {twice[0]!r} twice, and it has one token; name it once")
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
        attention: Maps of the tokens at `positions_of(spans)`, at each cross-attention; none where
            there are no such tokens.
        spans: Words of each picture's text and their positions.
        count: Number of words per picture: those of `most_telling` where there are more, absent
            ones where there are fewer; None keeps all.
        power: Exponent of the maps; above 1 peaks count for more.
        rest: Whether a last token is gathered by the attention that no word of `spans` gets, chosen
            or not.
    """
    attention = attention or [_no_attention(next(iter(features.values())))]
    device = attention[0].device
    widest = max(1, *map(len, spans))  # texts may have no words at all
    words = [[*own, *[""] * (widest - len(own))] for own in spans]
    mask = torch.tensor(
        [[bool(own.get(word)) for word in row] for own, row in zip(spans, words, strict=True)],
        dtype=torch.bool,
        device=device,
    )
    with torch.autocast(device.type, enabled=False):
        joined = _word_maps(attention, _pieces(spans, widest).to(device), power)
        shares, others = joined[..., :-1, :, :], joined[..., -1:, :, :]
        if count is not None:
            shares, mask, words = _chosen(shares, mask, words, count)
        if rest:
            shares = torch.cat([shares, others], dim=-3)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            words = [[*own, REST] for own in words]
        flat = shares.flatten(0, -4)
        parts = [gather(maps.flatten(0, -4), flat) for maps in features.values()]
        centres = places(shares)
    return WordTokens(
        tokens=torch.cat(parts, dim=-1).unflatten(0, shares.shape[:-3]),
        places=centres,
        maps=shares,
        mask=mask,
        words=tuple(
            tuple(word if there else "" for word, there in zip(own, row, strict=True))
            for own, row in zip(words, mask.tolist(), strict=True)
        ),
        features=features,
    )


def _no_attention(maps: Float[Tensor, "b *t c h w"]) -> Float[Tensor, "b *t 0 h w"]:
    """Attention to no token at all, so that what the words leave is the whole picture."""
    shape = (*maps.shape[:-3], 0, *maps.shape[-2:])
    return torch.zeros(shape, dtype=torch.float32, device=maps.device)


def _pieces(spans: Sequence[Spans], width: int) -> Float[Tensor, "b width tokens"]:
    """1 where a token at `positions_of(spans)` is a piece of a picture's word, else 0."""
    index = {position: place for place, position in enumerate(positions_of(spans))}
    shape = (len(spans), width, len(index))
    pieces = torch.zeros(shape, dtype=torch.float32, device="cpu")
    for row, own in enumerate(spans):
        for word, span in enumerate(own.values()):
            for position in span:
                pieces[row, word, index[position]] = 1
    return pieces


def _word_maps(
    attention: Sequence[Float[Tensor, "b *t tokens _h _w"]],
    pieces: Float[Tensor, "b words tokens"],
    power: float,
) -> Float[Tensor, "b *t words_1 h w"]:
    """Shares of the cells for each word, and behind them for what the words leave."""
    leading = attention[0].shape[:-3]
    rows = pieces.repeat_interleave(leading[1], dim=0) if len(leading) == 2 else pieces
    covered = rows.amax(dim=1, keepdim=True)  # words may overlap, and a token counts once
    layers = []
    for maps in attention:
        flat = maps.flatten(0, -4)
        of_words = einsum(rows, flat, "b words tokens, b tokens h w -> b words h w")
        left = 1 - einsum(covered, flat, "b one tokens, b tokens h w -> b one h w")
        layers.append(torch.cat([of_words, left.clamp_min(0)], dim=1))
    joined: Tensor = as_shares(join_layers(layers), power).unflatten(0, leading)
    return joined


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
    there = kept.take_along_dim(order, dim=1)
    index = order[..., None, None] if shares.ndim == 4 else order[:, None, :, None, None]
    chosen = shares.take_along_dim(index, dim=-3)
    present = there if shares.ndim == 4 else there[:, None]
    chosen = chosen * present[..., None, None]
    names = [[own[place] for place in row] for own, row in zip(words, order.tolist(), strict=True)]
    missing = count - order.shape[1]
    if missing > 0:
        chosen, there = F.pad(chosen, (0, 0, 0, 0, 0, missing)), F.pad(there, (0, missing))
        names = [[*own, *[""] * missing] for own in names]
    return chosen, there, names
