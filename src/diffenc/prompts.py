"""Texts to what the U-Net reads: states per token, and for SDXL a pooled state and sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc.errors import PromptError, ShapeError


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """Encoded prompts, one row each.

    Attributes:
        prompt_embeds: Text states (b l d).
        pooled_prompt_embeds: Pooled text (b p); SDXL only.
        time_ids: Original size, crop corner and target size (b 6); SDXL only.
        truncated: Number of tokens that did not fit, per row.
    """

    prompt_embeds: Float[Tensor, "b l d"]
    pooled_prompt_embeds: Float[Tensor, "b p"] | None = None
    time_ids: Float[Tensor, "b 6"] | None = None
    truncated: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def rows(self, batch: int) -> "PromptEmbeds":
        """The same prompts for `batch` images: one row is repeated, `batch` rows are kept.

        Raises:
            ShapeError: Any other number of rows.
        """
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ShapeError(f"{batch} images need 1 prompt or {batch}, got {len(self)}")
        return self._map(lambda rows: rows.expand(batch, *rows.shape[1:]), self.truncated * batch)

    def select(self, start: int, stop: int) -> "PromptEmbeds":
        """Rows `start` to `stop`."""
        return self._map(lambda rows: rows[start:stop], self.truncated[start:stop])

    def to(self, device: torch.device, dtype: torch.dtype) -> "PromptEmbeds":
        """On another device and in another dtype."""
        return self._map(lambda rows: rows.to(device, dtype), self.truncated)

    def _map(self, change: Any, truncated: tuple[int, ...]) -> "PromptEmbeds":
        pooled, time_ids = self.pooled_prompt_embeds, self.time_ids
        return replace(
            self,
            prompt_embeds=change(self.prompt_embeds),
            pooled_prompt_embeds=None if pooled is None else change(pooled),
            time_ids=None if time_ids is None else change(time_ids),
            truncated=truncated,
        )

    @staticmethod
    def concat(parts: Sequence["PromptEmbeds"]) -> "PromptEmbeds":
        """Rows of several, in order."""

        def joined(name: str) -> Tensor | None:
            rows = [getattr(part, name) for part in parts]
            return None if rows[0] is None else torch.cat(rows)

        states = joined("prompt_embeds")
        assert states is not None
        truncated = tuple(cut for part in parts for cut in part.truncated)
        return PromptEmbeds(states, joined("pooled_prompt_embeds"), joined("time_ids"), truncated)

    def pack(self) -> tuple[Tensor, ...]:
        """Everything as tensors, for a cache; `unpack` is the inverse."""
        extra = [t for t in (self.pooled_prompt_embeds, self.time_ids) if t is not None]
        parts = (self.prompt_embeds, *extra, torch.tensor(self.truncated))
        return tuple(part.clone() for part in parts)

    @staticmethod
    def unpack(parts: tuple[Tensor, ...]) -> "PromptEmbeds":
        """Inverse of `pack`."""
        pooled, time_ids = parts[1:-1] if len(parts) > 2 else (None, None)
        return PromptEmbeds(parts[0], pooled, time_ids, tuple(parts[-1].tolist()))

    def unet_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of a diffusers U-Net."""
        kwargs: dict[str, Any] = {"encoder_hidden_states": self.prompt_embeds}
        if self.pooled_prompt_embeds is not None:
            kwargs["added_cond_kwargs"] = {
                "text_embeds": self.pooled_prompt_embeds,
                "time_ids": self.time_ids,
            }
        return kwargs


def match_batch(prompts: str | Sequence[str], batch: int) -> list[str]:
    """One text for all images, or one for each.

    Returns:
        One text, or `batch` texts.

    Raises:
        PromptError: Another number of texts, or something that is no text.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise PromptError(f"prompts must be strings, got {type(text).__name__} at {index}")
    if len(texts) not in (1, batch):
        raise PromptError(
            f"pass one prompt for all images or one for each: {len(texts)} prompts, {batch} images"
        )
    return texts


def tokenize(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, tuple[int, ...]]:
    """Token ids (b l), padded and cut to the tokenizer's limit, and how many were cut per text."""
    limit = tokenizer.model_max_length
    inputs = tokenizer(
        list(texts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
    )
    whole = tokenizer(list(texts), truncation=False, verbose=False).input_ids
    return inputs.input_ids, tuple(max(0, len(ids) - limit) for ids in whole)
