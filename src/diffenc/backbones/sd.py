"""Stable Diffusion 1.x and 2.x, and everything shaped like them."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from diffenc._typing import LongPrompts
from diffenc.backbones.base import Backbone, check_text, grad_where_trained
from diffenc.prompts import (
    PromptEmbeds,
    count_windows,
    join_windows,
    tokenize,
    tokenize_windows,
)


class StableDiffusion(Backbone):
    """One text encoder, whose last hidden states condition the U-Net.

    Args:
        name: What it is called in messages and saved configs.
        unet: A `UNet2DConditionModel`.
        vae: An `AutoencoderKL` or `AutoencoderTiny`.
        scheduler: Anything of diffusers' with `alphas_cumprod`.
        text_encoder: A `CLIPTextModel`.
        tokenizer: Its `CLIPTokenizer`.
        default_size: See `Backbone`; None follows from the U-Net's config.
        default_taps: See `Backbone`; None is the `gdf` set.

    Raises:
        BackboneError: Parts do not fit each other.
    """

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
        default_size: int | None = None,
        default_taps: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(
            name=name,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
            default_size=default_size,
            default_taps=default_taps,
        )
        check_text(unet, (tokenizer, text_encoder))
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.freeze()

    def embed(
        self, texts: Sequence[str], *, size: tuple[int, int], long_prompts: LongPrompts = "truncate"
    ) -> PromptEmbeds:
        """Encode texts, one row each; see `Backbone.embed`."""
        cuts: tuple[int, ...] = (0,) * len(texts)
        counts: tuple[int, ...] = (1,) * len(texts)
        if long_prompts == "chunk":
            counts = count_windows(self.tokenizer, texts)
            ids = tokenize_windows(self.tokenizer, texts, counts)
        else:
            ids, cuts = tokenize(self.tokenizer, texts)
        rows, lengths = join_windows(self._states(ids), counts)
        return PromptEmbeds(rows, truncated=cuts, lengths=lengths)

    def embed_ids(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"],
        *,
        size: tuple[int, int],
    ) -> PromptEmbeds:
        """Encode tokenized texts, one row each; see `Backbone.embed_ids`."""
        return PromptEmbeds(self._states(input_ids), truncated=(0,) * len(input_ids))

    def _states(self, ids: Tensor) -> Tensor:
        device = next(self.text_encoder.parameters()).device
        with grad_where_trained(self.text_encoder):
            states: Tensor = self.text_encoder(ids.to(device)).last_hidden_state
        return states
