"""Which tokens of a text count in its score, and which states are its own."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from diffenc.errors import PromptError
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.inputs.tokenizing import limit_of, marks_of, prompt_ids, require_right
from diffenc.models.base import Backbone
from diffenc.scoring.config import TokenMask


def token_mask(
    backbone: Backbone,
    texts: Sequence[str | None],
    embeds: PromptEmbeds,
    kind: TokenMask,
) -> Bool[Tensor, "texts l"] | None:
    """Mask of the tokens of each text that count, by `ScorerConfig.token_mask`; None counts all.

    Where a text has several windows, the start and end tokens of each window are its own tokens.

    Args:
        backbone: Model whose tokenizer counts the tokens.
        texts: Prompts. None is no text, whose tokens all count.
        embeds: Embeddings of the texts.
        kind: Tokens that count: "none", "no_pad" or "content", as in `ScorerConfig.token_mask`.

    Raises:
        PromptError: A text without words where only words count.
    """
    if kind == "none":
        return None
    tokenizer: Any = backbone.tokenizer
    require_right(tokenizer)
    limit = limit_of(tokenizer)
    ids = prompt_ids(tokenizer, [text or "" for text in texts], special_tokens=False)
    shape = (len(texts), embeds.prompt_embeds.shape[1])
    mask = torch.zeros(shape, dtype=torch.bool, device="cpu")
    before, behind = marks_of(tokenizer)
    room = limit - before - behind
    for row, (words, length) in enumerate(zip(ids, embeds.row_lengths(), strict=True)):
        for window in range(max(1, length // limit)):
            count = min(max(len(words) - window * room, 0), room)
            first = window * limit
            start, stop = (
                (first + before, first + before + count)
                if kind == "content"
                else (first, first + before + count + behind)
            )
            mask[row, start:stop] = True
    if None in texts:
        mask[texts.index(None)] = True
    if empty := [text for text, kept in zip(texts, mask, strict=True) if not kept.any()]:
        raise PromptError(
            f"text {empty[0]!r} has no words, and token_mask 'content' pools nothing else; leave "
            "it out, or use token_mask='no_pad'"
        )
    return mask.to(backbone.device)
