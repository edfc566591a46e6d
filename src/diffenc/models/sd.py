"""Stable Diffusion 1.x and 2.x, and everything shaped like them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffenc.inputs.prompts import PromptEmbeds, join_windows
from diffenc.models.base import Backbone, grad_where_trained
from diffenc.models.part_checks import check_text
from diffenc.runtime.threads import lock_of


class StableDiffusion(Backbone):
    """One text encoder, whose last hidden states condition the U-Net.

    Args:
        name: Name of the backbone in messages and saved configs.
        unet: A `UNet2DConditionModel`.
        vae: An `AutoencoderKL` or `AutoencoderTiny`.
        scheduler: Scheduler of diffusers that has `alphas_cumprod`.
        text_encoder: Text encoder, a `CLIPTextModel`.
        tokenizer: `CLIPTokenizer` of the text encoder.
        default_size: Side of the square that images are brought to, in pixels; None derives it from
            the U-Net's config.
        default_taps: Taps that the encoder reads when none are asked for; None takes those of the
            "gdf" preset.

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
