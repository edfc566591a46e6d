"""Embeddings of texts with those of pictures in between, as a padded batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffenc.errors import ShapeError
from diffenc.mllm.chat import IGNORE_ID, IMAGE_ID


@dataclass(frozen=True, slots=True)
class Spliced:
    """What a language model gets in place of token ids.

    Attributes:
        inputs_embeds: Embeddings (b, l, d); zeros where nothing stands.
        attention_mask: Mask (b, l) that is 1 where something stands.
        labels: Labels (b, l); None where there were none.
    """

    inputs_embeds: Float[Tensor, "b l d"]
    attention_mask: Int[Tensor, "b l"]
    labels: Int[Tensor, "b l"] | None


def splice(
    embedding: nn.Module,
    input_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b t"] | None,
    pictures: Sequence[Float[Tensor, "n d"]],
    *,
    labels: Int[Tensor, "b t"] | None = None,
    side: Literal["left", "right"] = "right",
) -> Spliced:
    """Put each picture's tokens where `IMAGE_ID` stands.

    Args:
        embedding: Embedding of the language model's tokens.
        input_ids: Token ids, padded with anything.
        attention_mask: Mask that is 0 where padding stands; None is no padding.
        pictures: Tokens of the pictures, in the order in which they are shown, sample by sample;
            they may differ in length.
        labels: Labels of the tokens; None where there are none.
        side: Side on which the result is padded: "left" to generate.

    Raises:
        ShapeError: Another number of pictures than of places for them.
    """
    keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = [row[mask.bool()] for row, mask in zip(input_ids, keep, strict=True)]
    places = sum(int((row == IMAGE_ID).sum()) for row in rows)
    if places != len(pictures):
        raise ShapeError(f"{len(pictures)} pictures for {places} places in the texts")
    waiting = iter(pictures)
    targets: list[Tensor | None] = [None] * len(rows)
    if labels is not None:
        targets = [row[mask.bool()] for row, mask in zip(labels, keep, strict=True)]
    joined = [
        _join(embedding, row, waiting, target) for row, target in zip(rows, targets, strict=True)
    ]
    longest = max(len(embeds) for embeds, _ in joined)
    width = joined[0][0].shape[1]
    inputs_embeds = joined[0][0].new_zeros(len(rows), longest, width)
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=input_ids.device)
    spread = torch.full_like(mask, IGNORE_ID)
    parts = []
    for index, (embeds, target) in enumerate(joined):
        padding = inputs_embeds[index, len(embeds) :]
        parts.append(torch.cat([embeds, padding] if side == "right" else [padding, embeds]))
        first = 0 if side == "right" else longest - len(embeds)
        mask[index, first : first + len(embeds)] = 1
        if target is not None:
            spread[index, first : first + len(embeds)] = target
    return Spliced(torch.stack(parts), mask, None if labels is None else spread)


def _join(
    embedding: nn.Module, row: Tensor, waiting: Iterator[Tensor], target: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One sample's embeddings and labels."""
    is_image = row == IMAGE_ID
    texts = embedding(row.masked_fill(is_image, 0))
    pieces: list[Tensor] = []
    labels: list[Tensor] = []
    start = 0
    for place in is_image.nonzero().flatten().tolist():
        picture = next(waiting)
        pieces += [texts[start:place], picture.to(texts.device, texts.dtype)]
        if target is not None:
            labels += [target[start:place], target.new_full((len(picture),), IGNORE_ID)]
        start = place + 1
    pieces.append(texts[start:])
    if target is None:
        return torch.cat(pieces), None
    return torch.cat(pieces), torch.cat([*labels, target[start:]])
