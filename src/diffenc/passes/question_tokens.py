"""Tokens of a picture for a language model: of the grid's cells, of the prompt's words, or of both.

Each token has its place beside its features, so that a language model can tell left from right
where tokens are in no grid.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.checks.arguments import shown
from diffenc.config import EncoderConfig
from diffenc.errors import PromptError
from diffenc.features import Features
from diffenc.inputs.prompts import PromptEmbeds, match_batch
from diffenc.inputs.tokenizing import limit_of, marks_of, prompt_ids
from diffenc.inputs.words import words_of_ids
from diffenc.models.taps import TapInfo
from diffenc.passes.word_tokens import Spans, WordTokens, gather_words

PLACE_CHANNELS = 32
"""Channels of a token's place: sine and cosine of four numbers at four frequencies."""

_FREQUENCIES = PLACE_CHANNELS // 8


def token_channels(config: EncoderConfig, taps: Sequence[TapInfo]) -> tuple[int, ...]:
    """Channels of a token that come from each tap and half, in order, and from its place."""
    halves = 2 if config.conditioning == "concat" else 1
    channels = tuple(tap.channels for tap in taps for _ in range(halves))
    return channels if config.tokens == "grid" else (*channels, PLACE_CHANNELS)


def token_count(config: EncoderConfig, cells: int) -> int:
    """Number of tokens that stand for a picture whose grid has so many cells."""
    of_cells = 0 if config.tokens == "words" else cells
    return of_cells + (0 if config.tokens == "grid" else config.word_count)


def is_there(tokens: Float[Tensor, "*b n c"]) -> Bool[Tensor, "*b n"]:
    """Mask of the tokens that there are: those of absent words are zeros throughout.

    No other token is: each has the waves of its place.

    Args:
        tokens: Tokens of words, or of the grid and of words.
    """
    return tokens.detach().abs().amax(dim=-1) > 0


def embed_places(places: Float[Tensor, "*b 4"]) -> Float[Tensor, "*b 32"]:
    """Places as waves: sine and cosine of each number times π, 2π, 4π and 8π.

    A layer norm, which projectors have for each group of channels, leaves them distinct.

    Args:
        places: Centre and spread, see `diffenc.denoiser.gathering.places`.

    Source:
        Frequencies as in Mildenhall et al. 2020 (NeRF), arXiv:2003.08934, equation 4.
    """
    powers = torch.arange(_FREQUENCIES, dtype=places.dtype, device=places.device)
    angles = math.pi * places[..., None] * 2**powers
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def cell_places(grid: tuple[int, int], device: torch.device) -> Float[Tensor, "cells 4"]:
    """Places of a grid's cells, row by row: the middle of each, and the spread of its area."""
    height, width = grid
    rows, columns = (
        (torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side for side in grid
    )
    centres = torch.cartesian_prod(rows, columns)
    sides = torch.tensor([1 / height, 1 / width], dtype=torch.float32, device=device)
    spread = sides / math.sqrt(12)
    return torch.cat([centres, spread.expand(len(centres), 2)], dim=1)


def prompt_words(
    tokenizers: Sequence[Any],
    prompts: str | Sequence[str] | PromptEmbeds | None,
    batch: int,
    *,
    windows: bool,
) -> list[Spans]:
    """Words of each picture's prompt and their positions; none for a prompt without words.

    Args:
        tokenizers: Tokenizers of the model.
        prompts: What is given to the encoder.
        batch: Number of pictures.
        windows: Whether long texts are read in windows; otherwise they are cut.

    Raises:
        PromptError: Texts that were encoded without their words, or that the tokenizers of the
            model split differently.
    """
    if prompts is None:
        return [{}] * batch
    if isinstance(prompts, PromptEmbeds):
        if prompts.words is None:
            raise PromptError(
                "tokens of words are read under texts, and these were encoded before, which does "
                f"not tell their words: pass the texts themselves, got {shown(prompts)}"
            )
        words: list[Spans] = [dict(row) for row in prompts.words]
    else:
        texts = match_batch(prompts, batch)
        known = {text: _spans(tokenizers, text, windows) for text in dict.fromkeys(texts)}
        words = [known[text] for text in texts]
    return words * batch if len(words) == 1 else words


def _spans(tokenizers: Sequence[Any], text: str, windows: bool) -> Spans:
    first, *others = [prompt_ids(each, [text], special_tokens=False)[0] for each in tokenizers]
    if any(other != first for other in others):
        raise PromptError(
            f"the text encoders of this model split {text!r} differently; add textual inversions "
            "to all of its tokenizers"
        )
    return spans_of_ids(tokenizers[0], first, windows=windows)


def spans_of_ids(tokenizer: Any, ids: Sequence[int], *, windows: bool = False) -> Spans:
    """Words of a text and their positions in the text encoder's input.

    Args:
        tokenizer: Tokenizer of CLIP, T5 or Gemma, or one like them.
        ids: Ids of the text, without start, end and padding.
        windows: Whether long texts are read in windows; otherwise what is cut has no position.
    """
    limit, (before, behind) = limit_of(tokenizer), marks_of(tokenizer)
    room = limit - before - behind
    read = list(ids) if windows else list(ids)[:room]
    return {
        word: tuple(place // room * limit + place % room + before for place in places)
        for word, places in words_of_ids(tokenizer, read).items()
    }


def question_tokens(
    features: Features,
    attention: Sequence[Float[Tensor, "b *t tokens _h _w"]],
    words: Sequence[Spans],
    config: EncoderConfig,
    grid: int | tuple[int, int] | None = None,
) -> Float[Tensor, "b *t n c"]:
    """Tokens of the grid and of the words, as the config has them, with their places.

    Args:
        features: Features of the pass.
        attention: Maps of the words' tokens, see `gather_words`; none where no text has a word.
        words: Words of each picture's prompt and their positions.
        config: Kind of the tokens, and number of those of words.
        grid: Side, or (height, width), of the token grid; None takes the features'.
    """
    least = max(config.word_count, 2)  # a word, be it absent, and the rest
    gathered = gather_words(features, attention, words, count=least - 1, rest=True)
    of_words = placed_words(gathered)[..., least - config.word_count :, :]
    if config.tokens == "words":
        return of_words
    cells = features.tokens(grid)
    sides = features.grid if grid is None else (grid, grid) if isinstance(grid, int) else grid
    return torch.cat([placed_cells(cells, sides), of_words], dim=-2)


def placed_cells(
    cells: Float[Tensor, "*b n c"], grid: tuple[int, int]
) -> Float[Tensor, "*b n c_32"]:
    """Tokens of a grid's cells, row by row, with the waves of their places.

    Args:
        cells: Tokens of the cells.
        grid: (height, width) of the grid.
    """
    waves = embed_places(cell_places(grid, cells.device)).to(cells.dtype)
    return torch.cat([cells, waves.expand(*cells.shape[:-1], -1)], dim=-1)


def placed_words(gathered: WordTokens) -> Float[Tensor, "b *t words c_32"]:
    """Tokens of words with the waves of their places; absent words are zeros throughout."""
    height, width = gathered.maps.shape[-2:]
    waves = embed_places(_of_areas(gathered.places, (height, width)))
    mask = gathered.mask[:, None] if waves.ndim == 4 else gathered.mask
    waves = (waves * mask[..., None]).to(gathered.tokens.dtype)
    return torch.cat([gathered.tokens, waves], dim=-1)


def _of_areas(places: Float[Tensor, "*b 4"], grid: tuple[int, int]) -> Float[Tensor, "*b 4"]:
    """Places whose spread is that of the cells' areas, and so the same on every grid."""
    centres, spreads = places.split(2, dim=-1)
    sides = torch.tensor(grid, dtype=places.dtype, device=places.device)
    return torch.cat([centres, (spreads.square() + 1 / (12 * sides.square())).sqrt()], dim=-1)
