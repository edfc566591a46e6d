"""Stable Diffusion 3 and 3.5: picture and text joined in one attention, flow matching."""

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack  # of typing since Python 3.11

from diffenc.denoiser.concept_attention import Concepts
from diffenc.errors import BackboneError, PromptError
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.inputs.tokenizing import limit_of, own_places, token_ids
from diffenc.inputs.words import word_token_positions
from diffenc.models.base import Backbone, TransformerParts, grad_where_trained
from diffenc.models.part_checks import check_encoder
from diffenc.runtime.threads import lock_of

T5_TOKENS = 256
"""Tokens of a text that the pipeline's T5 reads; the padding counts, as the model has learnt it."""


class StableDiffusion3(Backbone):
    """Two CLIPs and one T5, whose states stand one behind the other: 77 of CLIP, 256 of T5.

    Every text has all of these states. The pipeline masks none of them, and neither is done here.
    Without T5, which has most of the model's parameters, zeros stand for its states, as in the
    pipeline.

    Args:
        text_encoder: First text encoder, a `CLIPTextModelWithProjection`.
        tokenizer: `CLIPTokenizer` of the first text encoder.
        text_encoder_2: Second text encoder, of the same class.
        tokenizer_2: `CLIPTokenizer` of the second text encoder.
        text_encoder_3: Third text encoder, a `T5EncoderModel`; None is none.
        tokenizer_3: Tokenizer of the third text encoder; None where there is none.
        parts: Name, transformer, VAE and scheduler, and defaults; see `TransformerParts`.

    Raises:
        BackboneError: Parts do not fit each other.

    Source:
        Esser et al. 2024 (Stable Diffusion 3), arXiv:2403.03206.
    """

    family = "sd3"
    reads_windows = shares_words = False
    reads_pooled = True

    def __init__(
        self,
        *,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        **parts: Unpack[TransformerParts],
    ) -> None:
        super().__init__(**parts)
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        if (text_encoder_3 is None) != (tokenizer_3 is None):
            raise BackboneError("text_encoder_3 and tokenizer_3 go together; pass both, or neither")
        if text_encoder_3 is not None:
            self.text_encoder_3 = text_encoder_3
            self.tokenizer_3 = within(tokenizer_3, T5_TOKENS)
        encoders = [part for name, part in self.parts().items() if name.startswith("text")]
        for words, encoder in zip(self.tokenizers, encoders, strict=True):
            check_encoder(words, encoder)
        self._check_text_width(encoders)
        self.freeze()

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """Those of both CLIPs, and T5's where there is one."""
        clips = (self.tokenizer, self.tokenizer_2)
        return (*clips, self.tokenizer_3) if hasattr(self, "tokenizer_3") else clips

    def word_positions(self, text: str, word: str) -> tuple[int, ...]:
        """Positions among the states of CLIP, and behind them of T5, of those that were kept."""
        first = limit_of(self.tokenizer)
        positions: list[int] = []
        faults = []
        starts = {self.tokenizer: 0, **dict.fromkeys(self.tokenizers[2:], first)}
        for tokenizer, start in starts.items():
            try:
                own = word_token_positions(tokenizer, text, word)
            except PromptError as fault:  # CLIP reads less of a text than T5
                faults.append(fault)
            else:
                positions += [start + place for place in own]
        if not positions:
            raise faults[-1]
        return tuple(positions)

    def own_positions(self, text: str) -> tuple[int, ...]:
        """Positions among the states of CLIP, and behind them of T5."""
        first = limit_of(self.tokenizer)
        behind = [first + place for each in self.tokenizers[2:] for place in own_places(each, text)]
        return (*own_places(self.tokenizer, text), *behind)

    def concepts(self, concepts: Sequence[str], *, size: tuple[int, int]) -> Concepts:
        """States of CLIP of the concepts in one text, behind its start; the first token of each.

        The release takes as many states as there are concepts, which is the same where each of
        them is one token.

        Raises:
            PromptError: They have more tokens than CLIP reads.
        """
        counts = map(len, token_ids(self.tokenizer, concepts, special_tokens=False))
        *starts, end = accumulate(counts, initial=1)
        if end > limit_of(self.tokenizer) - 1:
            raise PromptError(
                f"{len(concepts)} concepts have {end - 1} tokens together, and CLIP reads "
                f"{limit_of(self.tokenizer) - 2}; pass fewer of them"
            )
        states = self.embed([" ".join(concepts)], size=size).prompt_embeds[0, [0, *starts]]
        return Concepts(states, ahead=1, unit=True, cells_see=True)

    def _check_text_width(self, encoders: Sequence[Any]) -> None:
        config, (first, second, *others) = self.transformer.config, encoders
        pooled = first.config.projection_dim + second.config.projection_dim
        side_by_side = first.config.hidden_size + second.config.hidden_size
        width = others[0].config.d_model if others else config.joint_attention_dim
        if width != config.joint_attention_dim or side_by_side > width:
            raise BackboneError(
                f"T5 gives states of width {width}, both CLIPs of {side_by_side}, and the "
                f"transformer takes {config.joint_attention_dim}; they belong to different models"
            )
        if pooled != config.pooled_projection_dim:
            raise BackboneError(
                f"both CLIPs give pooled texts of width {pooled} and the transformer takes "
                f"{config.pooled_projection_dim}; they belong to different models"
            )

    def _embeds(
        self,
        ids: Sequence[Tensor],
        counts: Sequence[int],
        truncated: tuple[int, ...],
        size: tuple[int, int],
    ) -> PromptEmbeds:
        clips = [
            self._encode(encoder, rows, output_hidden_states=True)
            for encoder, rows in zip((self.text_encoder, self.text_encoder_2), ids, strict=False)
        ]
        states = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)
        width = self.transformer.config.joint_attention_dim
        states = F.pad(states, (0, width - states.shape[-1]))
        if len(ids) == 3:
            words = self._encode(self.text_encoder_3, ids[2])[0]
        else:
            words = states.new_zeros(len(states), T5_TOKENS, width)
        pooled = torch.cat([output[0] for output in clips], dim=-1)
        return PromptEmbeds(torch.cat([states, words], dim=1), pooled, truncated=truncated)

    @staticmethod
    def _encode(encoder: Any, ids: Tensor, **options: Any) -> Any:
        device = next(encoder.parameters()).device
        with lock_of(encoder), grad_where_trained(encoder):
            return encoder(ids.to(device), **options)


def within(tokenizer: Any, limit: int) -> Any:
    """The tokenizer, or a copy of it that keeps no more tokens than a limit."""
    if tokenizer.model_max_length <= limit:
        return tokenizer
    fitting = copy.deepcopy(tokenizer)
    fitting.model_max_length = limit
    return fitting
