"""One state per prompt, for what reads a question outside of the U-Net."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffenc._typing import LongPrompts
from diffenc.inputs.tokenizing import fit_rows, limit_of, prompt_ids
from diffenc.models.base import Backbone
from diffenc.passes.encoded import prompts_of


def mean_states(
    backbone: Backbone,
    texts: Sequence[str],
    *,
    size: tuple[int, int],
    long_prompts: LongPrompts = "truncate",
    use_cache: bool = True,
) -> Float[Tensor, "b d"]:
    """Mean state of each text's own tokens, its start and end included, as the U-Net reads them.

    Args:
        backbone: Model whose text encoders are called.
        texts: Prompts; the empty text has only its start and end tokens.
        size: Size of the pictures in pixels, (height, width).
        long_prompts: Treatment of texts beyond the encoder's limit, see `Backbone.embed`.
        use_cache: Whether encoded texts are looked up in the cache and kept there.
    """
    means = []
    for text in texts:  # each by itself: in windows their numbers of states differ
        embeds = prompts_of(
            backbone, [text], size=size, uncond=None, long_prompts=long_prompts, use_cache=use_cache
        )
        states = embeds.prompt_embeds[0]
        own = _own(backbone, text, len(states), long_prompts).to(states.device)
        means.append(states[own].mean(dim=0))
    return torch.stack(means)


def _own(backbone: Backbone, text: str, states: int, long_prompts: LongPrompts) -> Tensor:
    """Mask of a text's states: true for its own tokens, false for padding."""
    tokenizer = backbone.tokenizers[0]  # all tokenizers have the same words
    if long_prompts == "truncate":
        own = fit_rows(tokenizer, prompt_ids(tokenizer, [text]))[1][0, :states].bool()
        return F.pad(own, (0, states - len(own)))  # behind CLIP's states stand T5's, in SD 3
    # Windows are full but for the last one, which is padded as a short prompt is.
    windows = states // limit_of(tokenizer)
    count = len(prompt_ids(tokenizer, [text], special_tokens=False)[0]) + 2 * windows
    return torch.arange(states, dtype=torch.long, device="cpu") < count
