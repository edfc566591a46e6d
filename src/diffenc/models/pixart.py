"""PixArt-Σ and PixArt-α: transformers whose blocks attend to the text as a U-Net's do."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack  # of typing since Python 3.11

from diffenc.errors import ConfigError
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.models.base import Backbone, TransformerParts, grad_where_trained
from diffenc.models.part_checks import check_text
from diffenc.runtime.threads import lock_of

TOKENS = {"PixArtSigmaPipeline": 300, "PixArtAlphaPipeline": 120}
"""Tokens of a text that each pipeline reads."""


class PixArt(Backbone):
    """One T5, whose states condition every block by cross-attention.

    Only a text's own states are kept, without the padding that the pipeline masks. Texts are read
    in lower case, as the pipeline reads them. What the denoiser predicts beside the noise, its
    variance, is left out.

    Args:
        text_encoder: Text encoder, a `T5EncoderModel`.
        tokenizer: Tokenizer of the text encoder.
        pipeline: Class of diffusers' pipeline, which tells how many tokens of a text are read.
        parts: Name, transformer, VAE and scheduler, and defaults; see `TransformerParts`.

    Raises:
        BackboneError: Parts do not fit each other.

    Source:
        Chen et al. 2024 (PixArt-Σ), arXiv:2403.04692.
    """

    family = "pixart"
    reads_windows = pads_texts = False
    marks_of_texts = 1  # T5 marks the end of a text, Gemma its start

    def __init__(
        self,
        *,
        text_encoder: Any,
        tokenizer: Any,
        pipeline: str = "PixArtSigmaPipeline",
        **parts: Unpack[TransformerParts],
    ) -> None:
        super().__init__(**parts)
        check_text(self.transformer, (tokenizer, text_encoder))
        self.text_encoder, self.pipeline = text_encoder, pipeline
        self.tokenizer = self.fitted_tokenizer(tokenizer, pipeline)
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
        lengths = own_lengths(ids[0], self.tokenizer.pad_token_id)
        longest = max(lengths)
        device = next(self.text_encoder.parameters()).device
        rows = ids[0][:, :longest].to(device)
        places = torch.arange(longest, dtype=torch.long, device=device)
        mask = places < torch.tensor(lengths, dtype=torch.long, device=device)[:, None]
        with lock_of(self.text_encoder), grad_where_trained(self.text_encoder):
            states: Tensor = self.text_encoder(rows, attention_mask=mask.long())[0]
        whole = None if min(lengths) == longest else lengths
        return PromptEmbeds(states, truncated=truncated, lengths=whole)

    @classmethod
    def fitted_tokenizer(cls, tokenizer: Any, pipeline: str) -> Any:
        """One that reads texts in lower case, up to the pipeline's limit."""
        return lower_case(tokenizer, TOKENS[pipeline])

    def attended_states(self, states: Float[Tensor, "b l d"]) -> Float[Tensor, "b l _c"]:
        """States as the blocks read them: projected to their width."""
        projected: Tensor = self.transformer.caption_projection(states)
        return projected

    def _prediction(self, output: Tensor, noisy_latents: Tensor) -> Tensor:
        return output[:, : self.transformer.config.in_channels]


def own_lengths(ids: Tensor, pad_token_id: int) -> tuple[int, ...]:
    """Number of tokens of each row (b l) before the padding at its end."""
    places = torch.arange(1, ids.shape[1] + 1, dtype=torch.long, device=ids.device)
    lengths: list[int] = (places * (ids != pad_token_id)).amax(dim=1).clamp_min(1).tolist()
    return tuple(lengths)


def lower_case(tokenizer: Any, limit: int) -> Any:
    """A tokenizer that reads texts in lower case, up to a limit; one that does is not copied.

    Args:
        tokenizer: Fast tokenizer of transformers.
        limit: Largest number of tokens that it keeps.
    """
    from tokenizers import normalizers

    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} is a slow tokenizer, whose texts cannot be read in lower "
            "case; pass a fast one"
        )
    lowers = '"Lowercase"' in core.to_str()
    if lowers and tokenizer.model_max_length <= limit:
        return tokenizer
    fitting = copy.deepcopy(tokenizer)
    fitting.model_max_length = min(limit, tokenizer.model_max_length)
    if not lowers:
        own = core.normalizer
        steps = [normalizers.Lowercase(), normalizers.Strip(), *([] if own is None else [own])]
        fitting.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    return fitting
