"""Stable Diffusion XL, base."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack  # of typing since Python 3.11

from diffenc.inputs.prompts import PromptEmbeds, join_windows
from diffenc.models.base import Backbone, UNetParts, grad_where_trained
from diffenc.models.part_checks import check_text
from diffenc.runtime.threads import lock_of


class StableDiffusionXL(Backbone):
    """Two text encoders, pooled text and sizes: always passed, as the model was trained.

    The sizes tell the processed picture's, uncropped, as the pipeline's own defaults do.

    Args:
        text_encoder: Text encoder, a `CLIPTextModel`.
        tokenizer: `CLIPTokenizer` of the text encoder.
        text_encoder_2: A `CLIPTextModelWithProjection`.
        tokenizer_2: `CLIPTokenizer` of the second text encoder.
        force_zeros: Whether the unconditional embedding is zeros instead of the empty text's.
        parts: Name, U-Net, VAE and scheduler, and defaults; see `UNetParts`.

    Raises:
        BackboneError: Parts do not fit each other.
    """

    family = "sdxl"
    reads_sizes = reads_pooled = True

    def __init__(
        self,
        *,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        force_zeros: bool = True,
        **parts: Unpack[UNetParts],
    ) -> None:
        super().__init__(**parts)
        check_text(self.unet, (tokenizer, text_encoder), (tokenizer_2, text_encoder_2))
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.uncond_rule = "zeros" if force_zeros else "empty"
        self.freeze()

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """The first encoder's and the second's."""
        return self.tokenizer, self.tokenizer_2

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
        sizes = [[height, width, 0, 0, height, width]]
        time_ids = torch.tensor(sizes, dtype=states.dtype, device=states.device)
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
        with lock_of(text_encoder), grad_where_trained(text_encoder):
            return text_encoder(ids.to(device), output_hidden_states=True)
