"""Latents and prompt embeddings of a backbone, computed once for each image and each text."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc._typing import LongPrompts, Uncond
from diffenc.backbones.base import Backbone
from diffenc.cache import TensorCache, content_key, state_key
from diffenc.captioner import ClipEmbedder
from diffenc.latents import encode_posterior
from diffenc.prompts import PromptEmbeds


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
    batch_size: int | None = None,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Mode and deviation of scaled latents; the VAE runs only for pictures that it has not seen.

    Args:
        backbone: Whose VAE is called.
        pixel_values: RGB in [-1, 1].
        keys: Of `image_keys`; None computes everything anew and keeps nothing.
        batch_size: Most pictures per call of the VAE.
    """
    state = None if keys is None else state_key(backbone.vae)
    if keys is None or state is None:
        return _encode(backbone, pixel_values, batch_size)
    cache = backbone.caches.latents
    full = [(state, key) for key in keys]
    known = {key: entry for key in dict.fromkeys(full) if (entry := cache.get(key))}
    rows = {key: row for row, key in enumerate(full) if key not in known}
    if rows:
        fresh = _encode(backbone, pixel_values[list(rows.values())], batch_size)
        for key, mode, deviation in zip(rows, *fresh, strict=True):
            known[key] = (mode.detach().clone(), deviation.detach().clone())
            cache.put(key, known[key])
    modes, deviations = zip(*(known[key] for key in full), strict=True)
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
    texts: Sequence[str],
    *,
    size: tuple[int, int],
    uncond: Uncond | None,
    long_prompts: LongPrompts = "truncate",
    use_cache: bool = True,
) -> PromptEmbeds:
    """Encoded texts, one row each; each text is encoded once.

    Args:
        backbone: Whose text encoders are called.
        texts: Prompts. The empty text is the unconditional embedding, whatever its rule.
        size: (height, width) of the pictures, in pixels.
        uncond: Rule of the unconditional embedding; None is the model's own.
        long_prompts: See `Backbone.embed`.
        use_cache: Look up and keep.
    """
    states = [state_key(part) for name, part in backbone.parts().items() if name.startswith("text")]
    keep = use_cache and None not in states
    cache = backbone.caches.prompts
    keys = {text: (*states, text, size, uncond if text == "" else long_prompts) for text in texts}
    known: dict[str, PromptEmbeds] = {}
    if keep:
        for text, key in keys.items():
            if entry := cache.get(key):
                known[text] = PromptEmbeds.unpack(entry)
    missing = [text for text in keys if text not in known]
    if "" in missing:
        known[""] = backbone.embed_uncond(uncond, size=size)
    if worded := [text for text in missing if text]:
        fresh = backbone.embed(worded, size=size, long_prompts=long_prompts)
        known |= {text: fresh.select(row, row + 1) for row, text in enumerate(worded)}
    if keep:
        for text in missing:
            cache.put(keys[text], known[text].pack())
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
        pixel_values: RGB in [-1, 1], of its size.
        cache: Where embeddings are kept; None keeps nothing.
    """
    keys = None if cache is None else image_keys(pixel_values)
    state = None if keys is None else state_key(clip)
    trained = pixel_values.requires_grad or any(p.requires_grad for p in clip.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
        if cache is None or keys is None or state is None:
            return cast(Tensor, clip(pixel_values))
        full = [(state, key) for key in keys]
        known = {key: entry for key in dict.fromkeys(full) if (entry := cache.get(key))}
        rows = {key: row for row, key in enumerate(full) if key not in known}
        if rows:
            fresh = clip(pixel_values[list(rows.values())]).detach()
            for key, embeds in zip(rows, fresh, strict=True):
                known[key] = (embeds.clone(),)
                cache.put(key, known[key])
        return torch.stack([known[key][0] for key in full])
