"""Pictures and texts of a scoring call, each once, and encoded once."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.denoiser.attention_scores import Pooling
from diffenc.errors import NonFiniteError, PromptError
from diffenc.inputs.latents import draw_latents
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.inputs.tokenizing import limit_of, prompt_ids, require_right
from diffenc.models.base import Backbone, States
from diffenc.passes.inputs import image_keys, posterior_of, prompts_of
from diffenc.scoring.config import ScorerConfig, TokenMask

_Row = TypeVar("_Row")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ScoreInputs:
    """Distinct pictures and texts, ready for the U-Net.

    Attributes:
        backbone: The model.
        config: Config of the scorer.
        posterior: Mode and deviation of the latents of distinct pictures.
        picture_keys: Digests of the distinct pictures; None where nothing is remembered.
        picture_rows: Index among the distinct pictures, for each picture of the call.
        texts: Distinct texts; None is no text, whose embedding is the unconditional one.
        text_rows: Index among the distinct texts, for each text of the call.
        embeds: Embeddings of the distinct texts.
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


def encode_inputs(
    backbone: Backbone,
    pixel_values: Float[Tensor, "b 3 height width"],
    texts: Sequence[str],
    config: ScorerConfig,
    *,
    seed: int,
    use_cache: bool,
) -> ScoreInputs:
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
    embeds = prompts_of(
        backbone,
        known,
        size=size,
        uncond=config.uncond,
        long_prompts=config.long_prompts,
        use_cache=use_cache,
        states=states,
    )
    remember = use_cache and states.features is not None
    key = (states.features, size, config.posterior, config.uncond, config.long_prompts)
    return ScoreInputs(
        backbone=backbone,
        config=config,
        posterior=posterior,
        picture_keys=keys if remember else None,
        picture_rows=[place[key] for key in every_key],
        texts=known,
        text_rows=[known.index(text) for text in texts],
        embeds=embeds,
        mask=token_mask(backbone, known, embeds, config.token_mask),
        size=size,
        seed=seed,
        memory_key=key if remember else None,
        states=states,
    )


def token_mask(
    backbone: Backbone,
    texts: Sequence[str | None],
    embeds: PromptEmbeds,
    kind: TokenMask,
) -> Bool[Tensor, "texts l"] | None:
    """Mask of the tokens of each text that count, by `ScorerConfig.token_mask`; None counts all.

    Where a text has several windows, the start and end tokens of each window are its own tokens.

    Args:
        backbone: Model whose tokenizer counts the tokens.
        texts: Prompts. None is no text, whose tokens all count.
        embeds: Embeddings of the texts.
        kind: Tokens that count: "none", "no_pad" or "content", as in `ScorerConfig.token_mask`.

    Raises:
        PromptError: A text without words where only words count.
    """
    if kind == "none":
        return None
    tokenizer: Any = backbone.tokenizer
    require_right(tokenizer)
    limit = limit_of(tokenizer)
    ids = prompt_ids(tokenizer, [text or "" for text in texts], special_tokens=False)
    shape = (len(texts), embeds.prompt_embeds.shape[1])
    mask = torch.zeros(shape, dtype=torch.bool, device="cpu")
    for row, (words, length) in enumerate(zip(ids, embeds.row_lengths(), strict=True)):
        for window in range(length // limit):
            count = min(max(len(words) - window * (limit - 2), 0), limit - 2)
            first = window * limit
            start, stop = (
                (first + 1, first + 1 + count) if kind == "content" else (first, first + count + 2)
            )
            mask[row, start:stop] = True
    if None in texts:
        mask[texts.index(None)] = True
    if empty := [text for text, kept in zip(texts, mask, strict=True) if not kept.any()]:
        raise PromptError(
            f"text {empty[0]!r} has no words, and token_mask 'content' pools nothing else; leave "
            "it out, or use token_mask='no_pad'"
        )
    return mask.to(backbone.device)


def tokens_present(embeds: PromptEmbeds) -> Bool[Tensor, "texts l"] | None:
    """Mask of the states that are a text's own, where texts differ in that; None is all."""
    if embeds.lengths is None:
        return None
    place: dict[str, Any] = {"dtype": torch.long, "device": embeds.prompt_embeds.device}
    lengths = torch.tensor(embeds.lengths, **place)
    return torch.arange(embeds.prompt_embeds.shape[1], **place) < lengths[:, None]


def in_batches(
    rows: Sequence[_Row], batch_size: int, run: Callable[[Sequence[_Row]], _Result]
) -> Iterator[tuple[Sequence[_Row], _Result]]:
    """Rows in parts of at most `batch_size`, with what `run` makes of each.

    On CUDA a part that runs out of memory is repeated in halves, with one warning at the end.
    """
    size, start = batch_size, 0
    while start < len(rows):
        part = rows[start : start + size]
        try:
            result = run(part)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            size = (min(size, len(part)) + 1) // 2
            torch.cuda.empty_cache()
            continue
        yield part, result
        start += len(part)
    if size < batch_size:
        warnings.warn(
            f"calls of the U-Net with {batch_size} rows did not fit and were cut down to {size}. "
            f"Pass batch_size={size} to begin there.",
            stacklevel=2,
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


def warn_truncated(inputs: ScoreInputs) -> None:
    """Say once per call how many texts were cut."""
    if _CUTS_KNOWN.get():
        return
    if cut := sum(count > 0 for count in inputs.truncated):
        tokenizer: Any = inputs.backbone.tokenizer
        warnings.warn(
            f"{cut} of {len(inputs.truncated)} texts are longer than the "
            f"{tokenizer.model_max_length} tokens that the text encoder reads and were cut",
            stacklevel=4,
        )


def check_finite(scores: Tensor, backbone: Backbone) -> None:
    """Raise a `NonFiniteError` unless all scores are numbers."""
    if not torch.isfinite(scores).all():
        raise NonFiniteError(
            f"scores hold NaN or infinity with a U-Net in {backbone.dtype}; load the model with "
            "dtype=torch.bfloat16 or torch.float32, and check its weights if that is so already"
        )
