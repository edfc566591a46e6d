"""Pictures and texts of a scoring call, each once, and encoded once."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.denoiser.attention_scores import Pooling
from diffenc.inputs.latents import draw_latents
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.inputs.tokenizing import limits_of
from diffenc.models.base import Backbone, States
from diffenc.passes.encoded import image_keys, posterior_of, prompts_of
from diffenc.scoring.config import ScorerConfig
from diffenc.scoring.token_masks import token_mask


@dataclass(frozen=True)
class EncodedCall:
    """Distinct pictures and texts of a call, encoded and ready for the denoiser.

    Attributes:
        backbone: The model.
        config: Config of the scorer.
        posterior: Mode and deviation of the latents of distinct pictures.
        picture_keys: Digests of the distinct pictures; None where nothing is remembered.
        picture_rows: Index among the distinct pictures, for each picture of the call.
        texts: Distinct texts; None is no text, whose embedding is the unconditional one.
        text_rows: Index among the distinct texts, for each text of the call.
        embeds: Embeddings of the distinct texts.
        textless: Unconditional embedding, one row, where the config has `reuse`; else None.
        mask: Mask of the tokens of the distinct texts that count; None counts all.
        size: Size of the pictures in pixels, (height, width).
        seed: Seed of the noise.
        memory_key: Key of everything that results depend on beside the picture, the text, the noise
            and the kind of score; None remembers nothing.
        states: Keys of the model's state for this call.
    """

    backbone: Backbone
    config: ScorerConfig
    posterior: tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]
    picture_keys: list[bytes] | None
    picture_rows: list[int]
    texts: list[str | None]
    text_rows: list[int]
    embeds: PromptEmbeds
    textless: PromptEmbeds | None
    mask: Bool[Tensor, "texts l"] | None
    size: tuple[int, int]
    seed: int
    memory_key: tuple[object, ...] | None
    states: States

    def noise(self, step: tuple[int, int]) -> Float[Tensor, "c h w"]:
        """The noise of a (timestep, draw), on the CPU."""
        _, c, h, w = self.posterior[0].shape
        return shared_noise((c, h, w), seed=self.seed, timestep=step[0], draw=step[1])

    def noisy_latents(
        self, rows: Sequence[tuple[int, tuple[int, int]]]
    ) -> Float[Tensor, "rows c h w"]:
        """Latents of (picture, (timestep, draw)), each at its noise level."""
        modes, deviations = self.posterior
        known: dict[tuple[int, tuple[int, int]], Tensor] = {}
        for picture, step in rows:
            if (picture, step) in known:
                continue
            part = slice(picture, picture + 1)
            latents = draw_latents(
                modes[part],
                deviations[part],
                self.config.posterior,
                seed=self.seed,
                draw=step[1],
            )
            scheduler = self.backbone.scheduler
            known[picture, step] = add_noise(scheduler, latents, self.noise(step), step[0])
        return torch.cat([known[row] for row in rows])

    @property
    def truncated(self) -> tuple[int, ...]:
        """Tokens that did not fit, per text of the call."""
        return tuple(self.embeds.truncated[row] for row in self.text_rows)


def pooling_of(config: ScorerConfig) -> Pooling:
    """How a layer's attention is pooled."""
    return Pooling(config.space, config.lse_axis, config.lse_lambda, config.head_reduce)


def encode_call(
    backbone: Backbone,
    pixel_values: Float[Tensor, "b 3 height width"],
    texts: Sequence[str],
    config: ScorerConfig,
    *,
    seed: int,
    use_cache: bool,
) -> EncodedCall:
    """Encode each distinct picture and text once.

    Args:
        backbone: The model.
        pixel_values: Pictures in RGB, in [-1, 1].
        texts: One or more; where the config needs the unconditional half, None is added.
        config: Config of the scorer.
        seed: Seed of the noise.
        use_cache: Whether encoded pictures and texts are looked up in the cache and kept there.

    Raises:
        PromptError: A text without words where only words count.
    """
    every_key = image_keys(pixel_values)
    assert every_key is not None
    first = {key: row for row, key in reversed(list(enumerate(every_key)))}
    distinct = sorted(first.values())
    place = {every_key[row]: index for index, row in enumerate(distinct)}
    keys = [every_key[row] for row in distinct]
    size = (pixel_values.shape[2], pixel_values.shape[3])
    states = backbone.states()
    posterior = posterior_of(
        backbone,
        pixel_values[distinct],
        keys=keys if use_cache else None,
        states=states,
        batch_size=config.batch_size,
    )
    known: list[str | None] = list(dict.fromkeys(texts))
    if config.needs_uncond:
        known.append(None)
    embed = partial(
        prompts_of,
        backbone,
        size=size,
        uncond=config.uncond,
        long_prompts=config.long_prompts,
        use_cache=use_cache,
        states=states,
    )
    embeds = embed(known)
    remember = use_cache and states.features is not None
    key = (states.features, size, config.posterior, config.uncond, config.long_prompts)
    return EncodedCall(
        backbone=backbone,
        config=config,
        posterior=posterior,
        picture_keys=keys if remember else None,
        picture_rows=[place[key] for key in every_key],
        texts=known,
        text_rows=[known.index(text) for text in texts],
        embeds=embeds,
        textless=None if config.reuse is None else embed([None]),
        mask=token_mask(backbone, known, embeds, config.token_mask),
        size=size,
        seed=seed,
        memory_key=key if remember else None,
        states=states,
    )


_CUTS_KNOWN: ContextVar[bool] = ContextVar("diffenc_cuts_known", default=False)


@contextmanager
def cuts_known() -> Iterator[None]:
    """Inside, and in this thread, nothing is said of texts that are cut."""
    token = _CUTS_KNOWN.set(True)
    try:
        yield
    finally:
        _CUTS_KNOWN.reset(token)


def warn_cut(encoded: EncodedCall) -> None:
    """Say once per call how many texts were cut."""
    if _CUTS_KNOWN.get():
        return
    if cut := sum(count > 0 for count in encoded.truncated):
        limits = limits_of(encoded.backbone.tokenizers)
        readers = (
            "the text encoders of this model read" if " " in limits else "the text encoder reads"
        )
        warnings.warn(
            f"{cut} of {len(encoded.truncated)} texts are longer than the {limits} tokens that "
            f"{readers} and were cut",
            stacklevel=4,
        )
