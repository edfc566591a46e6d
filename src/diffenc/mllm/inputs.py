"""From pictures and token ids to what a language model reads."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffenc.checks.fields import require_finite
from diffenc.errors import ConfigError, PromptError, ShapeError
from diffenc.inputs.images import ImageSource
from diffenc.mllm.chat import IMAGE_ID, IMAGE_MARK
from diffenc.mllm.language import context_of
from diffenc.mllm.samples import Pictures, pictures_of
from diffenc.mllm.splice import Spliced, splice
from diffenc.mllm.vision import tokens_per_image


class PictureInputs(nn.Module):
    """Base of `DiffusionVLM`: encodes and projects pictures, and puts them among the words.

    Attributes:
        encoder: Encoder of the pictures.
        projector: Projector from the encoder's tokens to the language model's width.
        language_model: Language model whose word embeddings are used.
        image_batch_size: Largest number of pictures per call of the encoder; None is all at once.
    """

    encoder: Any
    projector: Any
    language_model: Any
    image_batch_size: int | None

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        device: torch.device = self.language_model.get_input_embeddings().weight.device
        return device

    @property
    def tokens_per_image(self) -> int | None:
        """Tokens that a picture takes of the context; None where that varies."""
        grid = getattr(self.projector, "grid", None)
        return grid[0] * grid[1] if grid is not None else tokens_per_image(self.encoder)

    @property
    def context(self) -> int | None:
        """Tokens that the language model holds; None where its config does not say."""
        return context_of(self.language_model)

    def encode_images(
        self,
        images: Sequence[ImageSource],
        prompts: Sequence[str] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """The encoder's tokens of pictures, before the projector.

        Args:
            images: One picture or more.
            prompts: Prompts, one for each picture; None is unconditional.

        Raises:
            PromptError: Prompts and pictures differ in number.
        """
        if prompts is not None:
            _check_prompts(prompts, len(images), "pictures")
        step = self.image_batch_size or len(images)
        tokens = []
        for first in range(0, len(images), step):
            part = list(images[first : first + step])
            texts = None if prompts is None else list(prompts[first : first + step])
            tokens.append(self.encoder(part, texts))
        return torch.cat(tokens)

    def _embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        images: Sequence[Pictures] | None,
        prompts: Sequence[str] | None,
        *,
        labels: Tensor | None = None,
        image_tokens: Sequence[Tensor] | None = None,
        side: Any = "right",
        more: int = 0,
    ) -> Spliced:
        if image_tokens is not None and (images is not None or prompts is not None):
            raise ConfigError(
                "image_tokens are what the encoder made of pictures and prompts, which it is not "
                "called with again; pass image_tokens alone, or leave them out"
            )
        shown = [pictures_of(entry) for entry in images or [None] * len(input_ids)]
        if len(shown) != len(input_ids):
            raise ShapeError(f"images for {len(shown)} samples, and {len(input_ids)} texts")
        if prompts is not None:
            _check_prompts(prompts, len(input_ids), "samples")
        _check_places(input_ids, attention_mask, shown, image_tokens)
        each = self.tokens_per_image
        if each is not None:
            self._check_length(input_ids, attention_mask, each, more)
        flat = [picture for entry in shown for picture in entry]
        tokens: list[Tensor] = list(image_tokens or [])
        if image_tokens is None and flat:
            texts = None
            if prompts is not None:
                texts = [text for text, e in zip(prompts, shown, strict=True) for _ in e]
            tokens = list(self.encode_images(flat, texts))
        pictures = self._project(tokens)
        if each is not None and (others := {len(values) for values in pictures} - {each}):
            raise ShapeError(
                f"pictures have {min(others)} tokens, and {each} were announced, by which texts "
                "are cut and checked: encoder, projector and image_tokens must go together"
            )
        for values in pictures:
            require_finite(values, "tokens of the projector", "check its weights, and its dtype")
        embedding = self.language_model.get_input_embeddings()
        spliced = splice(embedding, input_ids, attention_mask, pictures, labels=labels, side=side)
        context, length = self.context, spliced.inputs_embeds.shape[1]
        if context is not None and length + more > context:
            raise _too_long(length, more, context)
        return spliced

    def _project(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        if not tokens:
            return []
        if len({len(each) for each in tokens}) == 1:
            return list(self.projector(torch.stack([t.to(self.device) for t in tokens])))
        return [self.projector(each[None].to(self.device))[0] for each in tokens]

    def _check_length(self, ids: Tensor, mask: Tensor | None, each: int, more: int) -> None:
        """Raise before anything runs where a sample is longer than the context."""
        if self.context is None:
            return
        keep = torch.ones_like(ids) if mask is None else mask
        pictures = ((ids == IMAGE_ID) & keep.bool()).sum(1)
        longest = int((keep.sum(1) + pictures * (each - 1)).max())
        if longest + more > self.context:
            raise _too_long(longest, more, self.context, int(pictures.max()), each)


def _check_prompts(prompts: Sequence[str], count: int, what: str) -> None:
    if isinstance(prompts, str):
        raise PromptError(f"got one text for {count} {what}; pass a list with a prompt for each")
    if len(prompts) != count:
        raise PromptError(f"{len(prompts)} prompts for {count} {what}")


def _check_places(
    ids: Tensor,
    mask: Tensor | None,
    shown: Sequence[Sequence[ImageSource]],
    image_tokens: Sequence[Tensor] | None,
) -> None:
    keep = torch.ones_like(ids) if mask is None else mask
    places = ((ids == IMAGE_ID) & keep.bool()).sum(1).tolist()
    if image_tokens is not None:
        if len(image_tokens) != sum(places):
            raise ShapeError(f"tokens of {len(image_tokens)} pictures for {sum(places)} places")
        return
    for index, (count, pictures) in enumerate(zip(places, shown, strict=True)):
        if count != len(pictures):
            raise ShapeError(
                f"sample {index} has {count} places for pictures ({IMAGE_MARK}) and "
                f"{len(pictures)} pictures"
            )


def _too_long(length: int, more: int, context: int, pictures: int = 0, each: int = 0) -> ShapeError:
    of_pictures = f", {pictures} x {each} of them of pictures" if pictures else ""
    of_new = f" and {more} new ones" if more else ""
    return ShapeError(
        f"the longest sample has {length} tokens{of_pictures}{of_new}; the language model holds "
        f"{context}. Use a coarser grid (grid= of the encoder), fewer pictures, a shorter text or "
        "fewer new tokens"
    )


def check_encoder(encoder: nn.Module) -> None:
    """Raise a `ConfigError` unless it gives the tokens of pictures, at one timestep."""
    if not hasattr(encoder, "hidden_size") or not hasattr(encoder, "token_channels"):
        raise ConfigError(
            f"{type(encoder).__name__} is no encoder of pictures; pass a DiffusionEncoder, a "
            "FusedEncoder, or VisionTokens around a vision model of transformers"
        )
    if getattr(encoder, "mixer", None) is not None:
        return  # it has one stream, whatever it reads
    timestep = getattr(getattr(encoder, "config", None), "timestep", 0)
    if isinstance(timestep, tuple) and len(timestep) > 1:
        raise ConfigError(
            f"a language model reads one timestep, and this encoder gives {timestep}; pass one"
        )
