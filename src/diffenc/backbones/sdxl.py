"""Stable Diffusion XL, base."""

from collections.abc import Sequence
from typing import Any

import torch
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


class StableDiffusionXL(Backbone):
    """Two text encoders, pooled text and sizes: always passed, as the model was trained.

    The sizes tell the processed picture's, uncropped, as the pipeline's own defaults do.

    Args:
        name: What it is called in messages and saved configs.
        unet: A `UNet2DConditionModel` that reads pooled text and sizes.
        vae: An `AutoencoderKL` or `AutoencoderTiny`.
        scheduler: Anything of diffusers' with `alphas_cumprod`.
        text_encoder: A `CLIPTextModel`.
        tokenizer: Its `CLIPTokenizer`.
        text_encoder_2: A `CLIPTextModelWithProjection`.
        tokenizer_2: Its `CLIPTokenizer`.
        default_size: See `Backbone`; None follows from the U-Net's config.
        default_taps: See `Backbone`; None is the `gdf` set.
        force_zeros: The unconditional embedding is zeros, and not the empty text's.

    Raises:
        BackboneError: Parts do not fit each other.
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
        default_size: int | None = None,
        default_taps: tuple[str, ...] | None = None,
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
        check_text(unet, (tokenizer, text_encoder), (tokenizer_2, text_encoder_2))
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.uncond_rule = "zeros" if force_zeros else "empty"
        self.freeze()

    def embed(
        self, texts: Sequence[str], *, size: tuple[int, int], long_prompts: LongPrompts = "truncate"
    ) -> PromptEmbeds:
        """Encode texts, one row each; see `Backbone.embed`."""
        tokenizers = (self.tokenizer, self.tokenizer_2)
        counts: tuple[int, ...] = (1,) * len(texts)
        cuts = [(0,) * len(texts)]
        if long_prompts == "chunk":
            counts = tuple(map(max, *(count_windows(each, texts) for each in tokenizers)))
            ids = [tokenize_windows(each, texts, counts) for each in tokenizers]
        else:
            encoded = [tokenize(each, texts) for each in tokenizers]
            ids, cuts = [part[0] for part in encoded], [part[1] for part in encoded]
        cut = cuts[0] if len(cuts) == 1 else tuple(map(max, *cuts))
        return self._embeds(ids, counts, cut, size)

    def embed_ids(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"],
        *,
        size: tuple[int, int],
    ) -> PromptEmbeds:
        """Encode tokenized texts, one row each; see `Backbone.embed_ids`."""
        # Both tokenizers have the same words and pad with different ones.
        padding = attention_mask.to(input_ids.device) == 0
        second = input_ids.masked_fill(padding, self.tokenizer_2.pad_token_id)
        ones = (1,) * len(input_ids)
        return self._embeds([input_ids, second], ones, (0,) * len(input_ids), size)

    def _embeds(
        self,
        ids: Sequence[Tensor],
        counts: Sequence[int],
        truncated: tuple[int, ...],
        size: tuple[int, int],
    ) -> PromptEmbeds:
        # The pipeline conditions on the states before the last layer of both encoders, and on the
        # projected end token of the second; of several windows, the first one's.
        outputs = [
            self._encode(encoder, rows)
            for encoder, rows in zip((self.text_encoder, self.text_encoder_2), ids, strict=True)
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        rows, lengths = join_windows(states, counts)
        firsts = [sum(counts[:text]) for text in range(len(counts))]
        height, width = size
        time_ids = torch.tensor([[height, width, 0, 0, height, width]]).to(states)
        return PromptEmbeds(
            rows,
            outputs[1][0][firsts],
            time_ids.expand(len(counts), 6),
            truncated,
            lengths,
        )

    @staticmethod
    def _encode(text_encoder: Any, ids: Tensor) -> Any:
        device = next(text_encoder.parameters()).device
        with grad_where_trained(text_encoder):
            return text_encoder(ids.to(device), output_hidden_states=True)
