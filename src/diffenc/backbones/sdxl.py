"""Stable Diffusion XL, base."""

from collections.abc import Sequence
from typing import Any

import torch

from diffenc.backbones.base import Backbone
from diffenc.prompts import PromptEmbeds, tokenize


class StableDiffusionXL(Backbone):
    """Two text encoders, pooled text and sizes: always passed, as the model was trained.

    The sizes tell the processed picture's, uncropped (design of the pipeline's own defaults).
    """

    family = "sdxl"

    def __init__(
        self,
        *,
        name: str,
        unet: Any,
        vae: Any,
        scheduler: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        default_size: int,
        default_taps: tuple[str, ...],
        force_zeros: bool = True,
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
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.uncond_rule = "zeros" if force_zeros else "empty"
        self.freeze()

    def embed(self, texts: Sequence[str], *, size: tuple[int, int]) -> PromptEmbeds:
        """Encode texts, one row each; see `Backbone.embed`."""
        # The pipeline conditions on the states before the last layer of both encoders, and on the
        # projected end token of the second.
        states, cuts = [], []
        pooled = None
        towers = ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2))
        for tokenizer, text_encoder in towers:
            ids, cut = tokenize(tokenizer, texts)
            device = next(text_encoder.parameters()).device
            with torch.no_grad():
                output = text_encoder(ids.to(device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            cuts.append(cut)
            pooled = output[0]
        height, width = size
        ids = torch.tensor([[height, width, 0, 0, height, width]], device=states[0].device)
        return PromptEmbeds(
            torch.cat(states, dim=-1),
            pooled,
            ids.to(states[0].dtype).expand(len(texts), 6),
            tuple(map(max, *cuts)),
        )
