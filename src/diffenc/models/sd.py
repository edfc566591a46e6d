"""Stable Diffusion 1.x and 2.x, and everything shaped like them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack  # of typing since Python 3.11

from diffenc.inputs.prompts import PromptEmbeds, join_windows
from diffenc.models.base import Backbone, UNetParts, grad_where_trained
from diffenc.models.part_checks import check_text
from diffenc.runtime.threads import lock_of


class StableDiffusion(Backbone):
    """One text encoder, whose last hidden states condition the U-Net.

    Args:
        text_encoder: Text encoder, a `CLIPTextModel`.
        tokenizer: `CLIPTokenizer` of the text encoder.
        parts: Name, U-Net, VAE and scheduler, and defaults; see `UNetParts`.

    Raises:
        BackboneError: Parts do not fit each other.
    """

    family = "sd"

    def __init__(self, *, text_encoder: Any, tokenizer: Any, **parts: Unpack[UNetParts]) -> None:
        super().__init__(**parts)
        check_text(self.unet, (tokenizer, text_encoder))
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.freeze()

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """The one."""
        return (self.tokenizer,)

    def _embeds(
        self,
        ids: Sequence[Tensor],
        counts: Sequence[int],
        truncated: tuple[int, ...],
        size: tuple[int, int],
    ) -> PromptEmbeds:
        device = next(self.text_encoder.parameters()).device
        with lock_of(self.text_encoder), grad_where_trained(self.text_encoder):
            states: Tensor = self.text_encoder(ids[0].to(device)).last_hidden_state
        rows, lengths = join_windows(states, counts)
        return PromptEmbeds(rows, truncated=truncated, lengths=lengths)
