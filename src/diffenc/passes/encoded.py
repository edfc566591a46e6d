"""Latents and prompt embeddings of a backbone, computed once for each image and each text."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc._typing import LongPrompts, Uncond
from diffenc.checks.fields import require_finite
from diffenc.clip.captioner import ClipEmbedder
from diffenc.inputs.latents import encode_posterior
from diffenc.inputs.pictures.world import warn_of_other_world
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.memory.cache import Entry, TensorCache, content_key, recall, state_key
from diffenc.models.base import Backbone, States
from diffenc.models.shapes import BUNDLED_MODELS


def image_keys(pixel_values: Float[Tensor, "b 3 height width"]) -> list[bytes] | None:
    """A digest of each picture, or None where a gradient flows into them."""
    if pixel_values.requires_grad:
        return None
    return [content_key(picture) for picture in pixel_values]


def posterior_of(
    backbone: Backbone,
    pixel_values: Float[Tensor, "b 3 height width"],
    *,
    keys: Sequence[bytes] | None,
    states: States | None = None,
    batch_size: int | None = None,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Mode and deviation of scaled latents; the VAE runs only for pictures that it has not seen.

    Args:
        backbone: Model whose VAE is called.
        pixel_values: Pictures in RGB, in [-1, 1].
        keys: Keys that `image_keys` makes of the pictures; None computes everything anew and keeps
            nothing.
        states: Keys of the model's state for this call; None reads the state now.
        batch_size: Largest number of pictures per call of the VAE; None is all at once.
    """
    if backbone.name in BUNDLED_MODELS:
        warn_of_other_world(pixel_values, model=backbone.name)
    state = None if keys is None else (states or backbone.states()).latents
    if keys is None or state is None:
        return _encode(backbone, pixel_values, batch_size)
    entries = recall(
        backbone.caches.latents,
        [(state, key) for key in keys],
        lambda rows: zip(*_encode(backbone, pixel_values[rows], batch_size), strict=True),
    )
    modes, deviations = zip(*entries, strict=True)
    return torch.stack(modes), torch.stack(deviations)


def _encode(
    backbone: Backbone, pixel_values: Tensor, batch_size: int | None
) -> tuple[Tensor, Tensor]:
    grad = torch.is_grad_enabled() and (
        pixel_values.requires_grad or any(p.requires_grad for p in backbone.vae.parameters())
    )
    with torch.set_grad_enabled(grad):
        parts = pixel_values.split(batch_size or len(pixel_values))
        modes, deviations = zip(
            *(encode_posterior(backbone.vae, part) for part in parts), strict=True
        )
    return torch.cat(modes), torch.cat(deviations)


def prompts_of(
    backbone: Backbone,
    texts: Sequence[str | None],
    *,
    size: tuple[int, int],
    uncond: Uncond | None,
    long_prompts: LongPrompts = "truncate",
    use_cache: bool = True,
    states: States | None = None,
) -> PromptEmbeds:
    """Encoded texts, one row each; each text is encoded once.

    Args:
        backbone: Model whose text encoders are called.
        texts: Prompts. None is no prompt, which takes the unconditional embedding; "" is a text
            without words, encoded as any other.
        size: Size of the pictures in pixels, (height, width).
        uncond: Rule of the unconditional embedding; None is the model's own.
        long_prompts: Treatment of texts beyond the encoder's limit, see `Backbone.embed`.
        use_cache: Whether encoded texts are looked up in the cache and kept there.
        states: Keys of the model's state for this call; None reads the state now.
    """
    distinct = list(dict.fromkeys(texts))
    state = (states or backbone.states()).prompts if use_cache else None

    def embed(rows: list[int]) -> list[Entry]:
        known: dict[str | None, PromptEmbeds] = {}
        if any(distinct[row] is None for row in rows):
            known[None] = backbone.embed_uncond(uncond, size=size)
        if worded := [text for row in rows if (text := distinct[row]) is not None]:
            fresh = backbone.embed(worded, size=size, long_prompts=long_prompts)
            known |= {text: fresh.select(row, row + 1) for row, text in enumerate(worded)}
        return [known[distinct[row]].pack() for row in rows]

    entries = recall(
        None if state is None else backbone.caches.prompts,
        [(state, text, size, uncond if text is None else long_prompts) for text in distinct],
        embed,
    )
    known = dict(zip(distinct, map(PromptEmbeds.unpack, entries), strict=True))
    return PromptEmbeds.concat([known[text] for text in texts])


def image_embeds_of(
    clip: ClipEmbedder,
    pixel_values: Float[Tensor, "b 3 size size"],
    *,
    cache: TensorCache | None,
) -> Float[Tensor, "b c"]:
    """CLIP's embedding of pictures; it runs only for those that it has not seen.

    Args:
        clip: A frozen CLIP; a graph is built only where a gradient flows into the pictures, or
            something in it was unfrozen.
        pixel_values: Pictures in RGB, in [-1, 1], of CLIP's size.
        cache: Cache that embeddings are kept in; None keeps nothing.
    """
    keys = None if cache is None else image_keys(pixel_values)
    state = None if keys is None else state_key(clip)
    trained = pixel_values.requires_grad or any(p.requires_grad for p in clip.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
        if cache is None or keys is None or state is None:
            embeds = cast(Tensor, clip(pixel_values))
            require_finite(embeds, "embeddings of CLIP", "load it in float32")
            return embeds
        entries = recall(
            cache,
            [(state, key) for key in keys],
            lambda rows: ((embeds,) for embeds in clip(pixel_values[rows])),
        )
        embeds = torch.stack([each for (each,) in entries])
        require_finite(embeds, "embeddings of CLIP", "load it in float32, and check its weights")
        return embeds
