"""The unconditional and the conditional half of features, from one fused call of the U-Net.

Unconditional features of a picture are looked up first; what is missing of them and all
conditional ones are rows of one batch.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diffenc.backbones.base import Backbone
from diffenc.backbones.taps import LATENTS
from diffenc.cache import state_key
from diffenc.config import EncoderConfig
from diffenc.features import Maps
from diffenc.forward import read_taps
from diffenc.latents import draw_latents
from diffenc.noise import add_noise, shared_noise
from diffenc.prompts import PromptEmbeds

Posteriors = tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]


def read_halves(
    backbone: Backbone,
    config: EncoderConfig,
    taps: Sequence[str],
    posteriors: Posteriors,
    *,
    keys: Sequence[tuple[object, ...]] | None,
    uncond: PromptEmbeds | None,
    cond: PromptEmbeds | None,
) -> dict[str, Maps | None]:
    """Features of pictures without and with their texts.

    Args:
        backbone: Whose U-Net is called, where something has to be computed.
        config: Timesteps, draws, noise and seed.
        taps: Module paths, or "latents".
        posteriors: Mode and deviation of the latents of each picture.
        keys: Per picture what its unconditional features depend on beside weights and config; None
            looks nothing up and keeps nothing.
        uncond: Unconditional embeddings, a row per picture; None leaves that half out.
        cond: Texts, a row per picture; None leaves that half out.

    Returns:
        Under "uncond" and "cond" a map per tap, or None: (b c h w), or (b t c h w) where the config
        has several timesteps. No two share memory.

    Raises:
        NonFiniteError: A map holds NaN or infinity.
    """
    batch = len(posteriors[0])
    cache, known, full_keys = backbone.caches.features, {}, None
    if uncond is not None and keys is not None:
        state = [state_key(part) for part in backbone.parts().values()]
        if None not in state:
            options = (tuple(taps), config.timestep, config.draws, config.noise, config.seed)
            shared = (*state, *options, config.posterior, config.uncond)
            full_keys = [(*shared, *key) for key in keys]
            known = {key: found for key in set(full_keys) if (found := cache.get(key))}
    missing: list[int] = []
    if uncond is not None:
        missing = [i for i in range(batch) if not full_keys or full_keys[i] not in known]
    texts = [uncond.take(missing)] if uncond is not None and missing else []
    texts += [cond] if cond is not None else []
    shown = [*missing, *range(batch if cond is not None else 0)]
    maps = _read_rows(backbone, config, taps, posteriors, shown, texts)
    halves: dict[str, Maps | None] = {"uncond": None, "cond": None}
    fresh = {name: features[: len(missing)] for name, features in maps.items()}
    if full_keys:
        for row, index in enumerate(missing):
            known[full_keys[index]] = tuple(fresh[name][row].detach().clone() for name in taps)
            cache.put(full_keys[index], known[full_keys[index]])
        rows = [known[key] for key in full_keys]
        halves["uncond"] = {
            name: torch.stack([row[tap] for row in rows]) for tap, name in enumerate(taps)
        }
    elif uncond is not None:
        halves["uncond"] = {name: features.clone() for name, features in fresh.items()}
    if cond is not None:
        halves["cond"] = {name: maps[name][len(missing) :].clone() for name in taps}
    return halves


def _read_rows(
    backbone: Backbone,
    config: EncoderConfig,
    taps: Sequence[str],
    posteriors: Posteriors,
    shown: list[int],
    texts: list[PromptEmbeds],
) -> Maps:
    """Features of rows, mean over draws: (rows c h w), or (rows t c h w) for several steps.

    Args:
        backbone: See `read_halves`, as the next two.
        config: Timesteps, draws, noise and seed.
        taps: Names.
        posteriors: Of all pictures.
        shown: Which picture each row shows.
        texts: Their rows, in order.
    """
    if not shown:
        return {}
    steps, draws, rows = config.timesteps, config.draws, len(shown)
    clean = [
        draw_latents(*posteriors, config.posterior, seed=config.seed, draw=d)[shown]
        for d in range(draws)
    ]
    repeats = len(steps) * draws
    found: Maps = {}
    if names := [tap for tap in taps if tap != LATENTS]:
        noisy_latents = [
            _noised(backbone, config, clean[draw], step, draw)
            for step in steps
            for draw in range(draws)
        ]
        found = read_taps(
            backbone,
            torch.cat(noisy_latents),
            torch.tensor(steps).repeat_interleave(draws * rows),
            PromptEmbeds.concat(texts * repeats),
            names,
            batch_size=config.batch_size,
        )
    if LATENTS in taps:
        found[LATENTS] = torch.cat(clean * len(steps)).to(backbone.device, backbone.dtype)
    one = isinstance(config.timestep, int)
    if repeats == 1 and one:
        return {name: found[name] for name in taps}
    split = "(t d b) c h w -> b t d c h w"
    means = {
        name: rearrange(found[name], split, t=len(steps), d=draws).mean(dim=2) for name in taps
    }
    return {name: mean[:, 0] for name, mean in means.items()} if one else means


def _noised(
    backbone: Backbone, config: EncoderConfig, latents: Tensor, timestep: int, draw: int
) -> Tensor:
    if config.noise is None:
        return latents
    _, c, h, w = latents.shape
    noise = shared_noise((c, h, w), seed=config.seed, timestep=timestep, draw=draw)
    return add_noise(backbone.scheduler, latents, noise, timestep)
