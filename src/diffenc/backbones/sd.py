"""Stable Diffusion 1.x and 2.x, and everything shaped like them."""

from collections.abc import Sequence
from typing import Any

import torch

from diffenc.backbones.base import Backbone
from diffenc.prompts import PromptEmbeds, tokenize


class StableDiffusion(Backbone):
    """One text encoder, whose last hidden states condition the U-Net."""

    family = "sd"

    def __init__(
        self,
        *,
        name: str,
        unet: Any,
        vae: Any,
        scheduler: Any,
        text_encoder: Any,
        tokenizer: Any,
        default_size: int,
        default_taps: tuple[str, ...],
    ) -> None:
        super().__init__(
            name=name,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
            default_size=default_size,
            default_taps=default_taps,
        )
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.freeze()

    def embed(self, texts: Sequence[str], *, size: tuple[int, int]) -> PromptEmbeds:
        """Encode texts, one row each; see `Backbone.embed`."""
        ids, truncated = tokenize(self.tokenizer, texts)
        device = next(self.text_encoder.parameters()).device
        with torch.no_grad():
            states = self.text_encoder(ids.to(device)).last_hidden_state
        return PromptEmbeds(states, truncated=truncated)
