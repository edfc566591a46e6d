"""Sana: a transformer of linear attention, whose blocks attend to the text, on a deep VAE."""

import copy
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffenc.models.pixart import PixArt, lower_case

TOKENS = 300
"""Tokens of a text that are read."""


class Sana(PixArt):
    """One Gemma 2, whose states condition every block by cross-attention; flow matching.

    Texts are read as `PixArt` reads them, without the instruction that the pipeline puts before the
    text of a picture that is to be generated: both halves then differ by the text alone. States
    that were made with the instruction are taken as they are.

    Args:
        text_encoder: Text encoder, a `Gemma2Model`.
        tokenizer: Tokenizer of the text encoder.
        parts: Name, transformer, VAE and scheduler, and defaults; see `TransformerParts`.

    Raises:
        BackboneError: Parts do not fit each other.

    Source:
        Xie et al. 2024 (Sana), arXiv:2410.10629.
    """

    family = "sana"

    def __init__(self, **parts: Any) -> None:
        super().__init__(pipeline="SanaPipeline", **parts)

    @classmethod
    def fitted_tokenizer(cls, tokenizer: Any, pipeline: str) -> Any:
        """One that reads texts in lower case, up to a limit, and pads on the right."""
        fitting = lower_case(tokenizer, TOKENS)
        if fitting.padding_side != "right":
            fitting = copy.deepcopy(fitting) if fitting is tokenizer else fitting
            fitting.padding_side = "right"
        return fitting

    def attended_states(self, states: Float[Tensor, "b l d"]) -> Float[Tensor, "b l _c"]:
        """States as the blocks read them: projected to their width, and normalised."""
        projected: Tensor = self.transformer.caption_norm(super().attended_states(states))
        return projected

    def _prediction(self, output: Tensor, noisy_latents: Tensor) -> Tensor:
        return output
