"""FLUX.1: dual and single streams on packed latents, flow matching."""

from collections.abc import Sequence
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack  # of typing since Python 3.11

from diffenc.denoiser.concept_attention import Concepts
from diffenc.errors import BackboneError
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.inputs.tokenizing import own_places
from diffenc.inputs.words import word_token_positions
from diffenc.models.base import Backbone, TransformerParts, grad_where_trained
from diffenc.models.family_files import FAMILY_FILES
from diffenc.models.part_checks import check_encoder
from diffenc.models.sd3 import within
from diffenc.runtime.threads import lock_of


class Flux(Backbone):
    """One T5, whose states join the picture in every attention, and the pooled text of one CLIP.

    Every text has all of these states. The pipeline masks none of them, and neither is done here.
    A model with a guidance embedding (dev) is told the pipeline's scale of 3.5; it was distilled of
    guided predictions, so that it has no unconditional half to be guided by.

    Args:
        text_encoder: Text encoder whose pooled state is read, a `CLIPTextModel`.
        tokenizer: `CLIPTokenizer` of the first text encoder.
        text_encoder_2: Text encoder whose states are read, a `T5EncoderModel`.
        tokenizer_2: Tokenizer of the second text encoder.
        parts: Name, transformer, VAE and scheduler, and defaults; see `TransformerParts`.

    Raises:
        BackboneError: Parts do not fit each other.

    Source:
        Black Forest Labs 2024, FLUX.1; described in arXiv:2506.15742, section 2.
    """

    family = "flux"
    reads_windows = shares_words = False
    reads_pooled = True

    def __init__(
        self,
        *,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        **parts: Unpack[TransformerParts],
    ) -> None:
        super().__init__(**parts)
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2 = text_encoder_2
        limit = FAMILY_FILES["flux"].tokens_of("text_encoder_2", self.transformer.config)
        assert limit is not None  # T5's config tells none
        self.tokenizer_2 = within(tokenizer_2, limit)
        encoders = (text_encoder, text_encoder_2)
        for words, encoder in zip(self.tokenizers, encoders, strict=True):
            check_encoder(words, encoder)
        self._check_text_width(encoders)
        self.freeze()

    @property
    def is_guidance_distilled(self) -> bool:
        """Whether the transformer reads a guidance scale, as FLUX.1-dev does."""
        return bool(self.transformer.config.guidance_embeds)

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """CLIP's, and T5's."""
        return self.tokenizer, self.tokenizer_2

    def word_positions(self, text: str, word: str) -> tuple[int, ...]:
        """Positions among the states of T5."""
        return word_token_positions(self.tokenizer_2, text, word)

    def own_positions(self, text: str) -> tuple[int, ...]:
        """Positions among the states of T5."""
        return own_places(self.tokenizer_2, text)

    def concepts(self, concepts: Sequence[str], *, size: tuple[int, int]) -> Concepts:
        """The first state of T5 of each concept, encoded by itself, without a pooled text."""
        states = self.embed(concepts, size=size).prompt_embeds[:, 0]
        return Concepts(states, pooled=False)

    def _check_text_width(self, encoders: Sequence[Any]) -> None:
        config, (clip, t5) = self.transformer.config, encoders
        widths = (clip.config.hidden_size, t5.config.d_model)
        if widths != (config.pooled_projection_dim, config.joint_attention_dim):
            raise BackboneError(
                f"CLIP pools texts to width {widths[0]} and T5 gives states of {widths[1]}, and "
                f"the transformer takes {config.pooled_projection_dim} and "
                f"{config.joint_attention_dim}; they belong to different models"
            )

    def _embeds(
        self,
        ids: Sequence[Tensor],
        counts: Sequence[int],
        truncated: tuple[int, ...],
        size: tuple[int, int],
    ) -> PromptEmbeds:
        pooled = self._encode(self.text_encoder, ids[0]).pooler_output
        return PromptEmbeds(
            self._encode(self.text_encoder_2, ids[1])[0], pooled, truncated=truncated
        )

    @staticmethod
    def _encode(encoder: Any, ids: Tensor) -> Any:
        device = next(encoder.parameters()).device
        with lock_of(encoder), grad_where_trained(encoder):
            return encoder(ids.to(device))

    def _prediction(
        self, output: Tensor, noisy_latents: Tensor
    ) -> Float[Tensor, "b c height width"]:
        h, w = (side // 2 for side in noisy_latents.shape[-2:])
        unpacked: Tensor = rearrange(
            output, "b (h w) (c rows columns) -> b c (h rows) (w columns)",
            h=h, w=w, rows=2, columns=2,
        )  # fmt: skip
        return unpacked
