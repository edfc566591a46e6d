"""The texts of a call: what is given becomes the prompts of both halves, once."""

from collections.abc import Callable, Sequence

from diffenc._typing import Conditioning
from diffenc.config import EncoderConfig
from diffenc.inputs.prompts import PromptEmbeds, match_batch
from diffenc.models.base import Backbone, States
from diffenc.passes.encoded import prompts_of

Prompts = str | Sequence[str] | PromptEmbeds | None
"""One text for all pictures or one for each, texts encoded before, or None for no prompt."""


def text_halves(
    backbone: Backbone,
    config: EncoderConfig,
    prompts: Prompts,
    conditioning: Conditioning,
    *,
    batch: int,
    size: tuple[int, int],
    sizes: Sequence[tuple[int, int]] | None,
    states: States,
    use_cache: bool,
    change: Callable[[PromptEmbeds], PromptEmbeds],
) -> tuple[PromptEmbeds | None, PromptEmbeds | None]:
    """Encoded texts of the unconditional and of the conditional half, a row for each picture.

    Args:
        backbone: Model whose text encoders are called.
        config: Rule of the unconditional embedding, and treatment of long prompts.
        prompts: What is given.
        conditioning: Halves that are needed: "uncond", "cond", or both. Where a part of the U-Net
            runs without the text (`reuse`), unconditional texts are there in any case.
        batch: Number of pictures.
        size: Size of the processed pictures in pixels, (height, width).
        sizes: Size that SDXL is told for each picture; None tells the processed one.
        states: Keys of the model's state for this call.
        use_cache: Whether encoded texts are looked up in the cache and kept there.
        change: Function that the conditional texts pass through, such as the captioner's.

    Returns:
        None for a half that is not needed.

    Raises:
        PromptError: A prompt is no text, or their number fits the pictures in no way.
        ShapeError: Texts encoded before are those of another kind of model.
    """

    def embed(texts: Sequence[str | None]) -> PromptEmbeds:
        return prompts_of(
            backbone,
            texts,
            size=size,
            uncond=config.uncond,
            long_prompts=config.long_prompts,
            use_cache=use_cache,
            states=states,
        ).rows(batch)

    uncond = cond = None
    if conditioning != "cond" or config.reuse is not None:
        uncond = embed([None])
    if conditioning != "uncond":
        if isinstance(prompts, PromptEmbeds):
            backbone.check_embeds(prompts)
            cond = change(prompts.rows(batch))
        else:
            cond = change(embed([None] if prompts is None else match_batch(prompts, batch)))
    if sizes is not None:
        uncond = uncond and uncond.with_original_sizes(sizes)
        cond = cond and cond.with_original_sizes(sizes)
    return uncond, cond
