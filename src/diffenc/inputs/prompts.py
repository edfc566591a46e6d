"""Convert texts to inputs of the U-Net: token states, and for SDXL a pooled state and sizes."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffenc.checks.arguments import entries
from diffenc.errors import PromptError, ShapeError
from diffenc.inputs.policies import (
    DrawnPrompts,
    PromptPolicy,
    PromptSample,
    draw_prompts,
    parse_policy,
    strip_template,
)
from diffenc.inputs.tokenizing import fit_rows, limit_of, prompt_ids

__all__ = [  # policies are imported from here by users, who need not know that they are a file
    "DrawnPrompts",
    "PromptEmbeds",
    "PromptPolicy",
    "PromptSample",
    "count_cut",
    "count_windows",
    "draw_prompts",
    "join_windows",
    "match_batch",
    "parse_policy",
    "strip_template",
    "tokenize",
    "tokenize_windows",
]


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """Encoded prompts, one row each.

    Attributes:
        prompt_embeds: Text states (b l d).
        pooled_prompt_embeds: Pooled text (b p); of SDXL and SD 3 only.
        time_ids: Original size, crop corner and target size (b 6); SDXL only.
        truncated: Number of tokens that did not fit, per row.
        lengths: Number of states that belong to each row's own text, if rows differ in that; the
            rest is padding that the U-Net is told to ignore. None means that all states count.
        words: Words of each row's text and the positions of their states; None is not known. Parts
            and joins of rows do not keep them.
    """

    prompt_embeds: Float[Tensor, "b l d"]
    pooled_prompt_embeds: Float[Tensor, "b p"] | None = None
    time_ids: Float[Tensor, "b 6"] | None = None
    truncated: tuple[int, ...] = ()
    lengths: tuple[int, ...] | None = None
    words: tuple[Mapping[str, tuple[int, ...]], ...] | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows into the texts."""
        pooled = self.pooled_prompt_embeds
        return self.prompt_embeds.requires_grad or (pooled is not None and pooled.requires_grad)

    def rows(self, batch: int) -> "PromptEmbeds":
        """The same prompts for `batch` images: one row is repeated, `batch` rows are kept.

        Raises:
            ShapeError: Any other number of rows.
        """
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ShapeError(f"{batch} images need 1 prompt or {batch}, got {len(self)}")
        return self._map(
            lambda rows: rows.expand(batch, *rows.shape[1:]),
            self.truncated * batch,
            None if self.lengths is None else self.lengths * batch,
        )

    def select(self, start: int, stop: int) -> "PromptEmbeds":
        """Rows `start` to `stop`, without the padding that only others need."""
        lengths = None if self.lengths is None else self.lengths[start:stop]
        part = self._map(lambda rows: rows[start:stop], self.truncated[start:stop], lengths)
        if not lengths:
            return part
        longest = max(lengths)
        return replace(
            part,
            prompt_embeds=part.prompt_embeds[:, :longest],
            lengths=None if min(lengths) == longest else lengths,
        )

    def take(self, rows: Sequence[int]) -> "PromptEmbeds":
        """Some rows, in the order given."""
        return PromptEmbeds.concat([self.select(row, row + 1) for row in rows])

    def to(self, device: torch.device, dtype: torch.dtype) -> "PromptEmbeds":
        """Move to another device and dtype."""
        return self._map(lambda rows: rows.to(device, dtype), self.truncated, self.lengths)

    def with_original_sizes(self, sizes: Sequence[tuple[int, int]]) -> "PromptEmbeds":
        """Tell SDXL other sizes, (height, width) per row, that the pictures had before resizing.

        Raises:
            ShapeError: These embeddings carry no sizes, or their number is not that of the rows.
        """
        if self.time_ids is None or len(sizes) != len(self):
            raise ShapeError(
                f"{len(sizes)} original sizes for {len(self)} prompts"
                + (" of a model that reads no sizes" if self.time_ids is None else "")
            )
        original = torch.tensor(sizes, dtype=self.time_ids.dtype, device=self.time_ids.device)
        return replace(self, time_ids=torch.cat([original, self.time_ids[:, 2:]], dim=1))

    def _map(
        self, change: Any, truncated: tuple[int, ...], lengths: tuple[int, ...] | None
    ) -> "PromptEmbeds":
        pooled, time_ids = self.pooled_prompt_embeds, self.time_ids
        return replace(
            self,
            prompt_embeds=change(self.prompt_embeds),
            pooled_prompt_embeds=None if pooled is None else change(pooled),
            time_ids=None if time_ids is None else change(time_ids),
            truncated=truncated,
            lengths=lengths,
            words=None,
        )

    def row_lengths(self) -> tuple[int, ...]:
        """Number of states of each row."""
        return self.lengths or (self.prompt_embeds.shape[1],) * len(self)

    @staticmethod
    def concat(parts: Sequence["PromptEmbeds"]) -> "PromptEmbeds":
        """Rows of several, in order, as long as the longest text.

        Shorter ones are padded, and `lengths` says so.
        """

        def joined(name: str) -> Tensor | None:
            rows = [getattr(part, name) for part in parts]
            return None if rows[0] is None else torch.cat(rows)

        lengths = tuple(length for part in parts for length in part.row_lengths())
        longest = max(lengths)
        states = torch.cat([_fitted(part.prompt_embeds, longest) for part in parts])
        truncated = tuple(cut for part in parts for cut in part.truncated)
        return PromptEmbeds(
            states,
            joined("pooled_prompt_embeds"),
            joined("time_ids"),
            truncated,
            None if min(lengths) == longest else lengths,
        )

    def pack(self) -> tuple[Tensor, ...]:
        """Convert to tensors, for a cache; `unpack` is the inverse. Rows must have one length."""
        assert self.lengths is None
        extra = [t for t in (self.pooled_prompt_embeds, self.time_ids) if t is not None]
        parts = (
            self.prompt_embeds,
            *extra,
            torch.tensor(self.truncated, dtype=torch.long, device="cpu"),
        )
        return tuple(part.clone() for part in parts)

    @staticmethod
    def unpack(parts: tuple[Tensor, ...]) -> "PromptEmbeds":
        """Inverse of `pack`."""
        pooled, time_ids = (*parts[1:-1], None, None)[:2]
        return PromptEmbeds(parts[0], pooled, time_ids, tuple(parts[-1].tolist()))

    def unet_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of a diffusers U-Net."""
        # Rows that share memory, as repeated ones do, make a pass of SDXL a fifth slower on a CPU.
        kwargs: dict[str, Any] = {"encoder_hidden_states": self.prompt_embeds.contiguous()}
        if self.pooled_prompt_embeds is not None:
            kwargs["added_cond_kwargs"] = {
                "text_embeds": self.pooled_prompt_embeds,
                "time_ids": self.time_ids,
            }
        if (own := self.own_states()) is not None:
            kwargs["encoder_attention_mask"] = own
        return kwargs

    def own_states(self) -> Bool[Tensor, "b l"] | None:
        """Mask of the states that are a text's own, where texts differ in that; None is all."""
        if self.lengths is None:
            return None
        device = self.prompt_embeds.device
        places = torch.arange(self.prompt_embeds.shape[1], dtype=torch.long, device=device)
        return places < torch.tensor(self.lengths, dtype=torch.long, device=device)[:, None]


def _fitted(states: Float[Tensor, "b l d"], length: int) -> Float[Tensor, "b length d"]:
    """States of which padding was added, or that of no row's own text was left out."""
    missing = length - states.shape[1]
    return torch.nn.functional.pad(states, (0, 0, 0, missing)) if missing else states


def match_batch(prompts: str | Sequence[str], batch: int) -> list[str]:
    """Check that there is one text for all images, or one for each.

    Returns:
        One text, or `batch` texts.

    Raises:
        PromptError: Another number of texts, or something that is no text.
    """
    if not isinstance(prompts, Iterable) or isinstance(prompts, (Mapping, Set)):
        raise PromptError(
            f"prompts must be a string or a list of strings, got {type(prompts).__name__}"
        )
    texts = [prompts] if isinstance(prompts, str) else entries(prompts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise PromptError(f"prompts must be strings, got {type(text).__name__} at {index}")
        if not _is_unicode(text):
            raise PromptError(
                f"prompt {index} is no valid Unicode text: {text!r} holds half of a surrogate "
                "pair; decode it with errors='replace'"
            )
    if len(texts) not in (1, batch):
        raise PromptError(
            f"pass one prompt for all images or one for each: {len(texts)} prompts, {batch} images"
        )
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def tokenize(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, tuple[int, ...]]:
    """Token ids (b l), padded and cut to the tokenizer's limit, and how many were cut per text."""
    whole = prompt_ids(tokenizer, texts)
    ids, _ = fit_rows(tokenizer, whole)
    return ids, count_cut(tokenizer, whole)


def count_cut(tokenizer: Any, whole: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Number of tokens of each whole row, with start and end, that exceed the tokenizer's limit."""
    limit = limit_of(tokenizer)
    return tuple(max(0, len(ids) - limit) for ids in whole)


def count_windows(tokenizer: Any, texts: Sequence[str]) -> tuple[int, ...]:
    """Number of windows of the tokenizer's limit that each text fills; 1 for an empty text."""
    room = limit_of(tokenizer) - 2
    whole = prompt_ids(tokenizer, texts, special_tokens=False)
    return tuple(max(1, math.ceil(len(ids) / room)) for ids in whole)


def tokenize_windows(
    tokenizer: Any, texts: Sequence[str], counts: Sequence[int]
) -> Int[Tensor, "windows l"]:
    """Token ids of long texts, cut into windows that each begin and end as a prompt does.

    A window holds two tokens less than the limit, which its start and end token take; the last
    one is padded as a short prompt is. This is the way of most programs for Stable Diffusion; the
    text encoder sees each window by itself.

    Args:
        tokenizer: Tokenizer that gives the ids, the special tokens and the limit.
        texts: Prompts of any length.
        counts: Number of windows of each text, `count_windows` or more; surplus windows stay empty.
    """
    room = limit_of(tokenizer) - 2
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    whole = prompt_ids(tokenizer, texts, special_tokens=False)
    rows = [
        [first, *ids[start : start + room], last]
        for ids, count in zip(whole, counts, strict=True)
        for start in range(0, count * room, room)
    ]
    return fit_rows(tokenizer, rows)[0]


def join_windows(
    states: Float[Tensor, "windows l d"], counts: Sequence[int]
) -> tuple[Float[Tensor, "b length d"], tuple[int, ...] | None]:
    """States of windows side by side: those of a text in one row, shorter rows padded.

    Returns:
        The rows, and `PromptEmbeds.lengths`.
    """
    texts = [part.flatten(0, 1) for part in states.split(list(counts))]
    lengths = tuple(map(len, texts))
    rows: Tensor = pad_sequence(texts, batch_first=True)
    return rows, None if min(lengths) == max(lengths) else lengths
