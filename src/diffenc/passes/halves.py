"""The unconditional and the conditional half of features, from one fused call of the U-Net.

Unconditional features of a picture are looked up first; what is missing of them and all
conditional ones are rows of one batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diffenc.checks.fields import require_finite
from diffenc.config import EncoderConfig
from diffenc.denoiser.adaptive_norm import is_adaptive_norm, normed
from diffenc.errors import ConfigError
from diffenc.features import Maps
from diffenc.inputs.latents import draw_latents
from diffenc.inputs.noise import add_noise, shared_noise
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.memory.cache import Entry, recall
from diffenc.memory.object_watch import object_key
from diffenc.models.base import Backbone, States
from diffenc.models.taps import LATENTS, TapInfo
from diffenc.passes.forward import AttentionRead, attention_key, compiled_taps, read_taps
from diffenc.passes.reuse import Reuse, check_reuse, prefix_of, without_text

Posteriors = tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]


def read_halves(
    backbone: Backbone,
    config: EncoderConfig,
    taps: Sequence[str],
    posteriors: Posteriors,
    *,
    keys: Sequence[tuple[object, ...]] | None,
    states: States | None = None,
    uncond: PromptEmbeds | None,
    cond: PromptEmbeds | None,
    textless: PromptEmbeds | None = None,
    attention: AttentionRead | None = None,
) -> dict[str, Maps | None]:
    """Features of pictures without and with their texts.

    Args:
        backbone: Model whose U-Net is called, where something has to be computed.
        config: Config that gives the timesteps, draws, noise and seed.
        taps: Names of the taps: module paths of the U-Net, or "latents".
        posteriors: Mode and deviation of the latents of each picture.
        keys: Keys of what the unconditional features of each picture depend on beside the weights
            and the config; None looks nothing up and keeps nothing.
        states: Keys of the model's state for this call; None reads the state now.
        uncond: Unconditional embeddings, one row per picture; None leaves that half out.
        cond: Encoded texts, one row per picture; None leaves that half out.
        textless: Unconditional embeddings, one row per picture, for what runs without a text where
            the config has `reuse`.
        attention: Cross-attention that is read in the same pass, under the texts; None reads none.

    Returns:
        Maps by tap under "uncond" and "cond", or None for a half that was left out: (b c h w), or
        (b t c h w) where the config has several timesteps. No two maps share memory. Maps of
        `attention` stand in "cond", under `diffenc.passes.forward.attention_key`.

    Raises:
        NonFiniteError: A map holds NaN or infinity.
    """
    batch = len(posteriors[0])
    states = states or backbone.states()
    state = None if keys is None else states.features
    compiled = None
    if attention is None and config.reuse is None and config.discard is None:
        compiled = compiled_taps(backbone, [tap for tap in taps if tap != LATENTS], states)
    parts: list[Maps] = []
    pictures = [(state, *key) for key in keys] if keys and state is not None else None
    layers = () if attention is None else attention.layers
    reuse = partial(_reuse, backbone, config, taps, layers, pictures, textless)

    def read(missing: list[int]) -> list[Entry]:
        texts = [uncond.take(missing)] if uncond is not None and missing else []
        texts += [cond] if cond is not None else []
        shown = [*missing, *range(batch if cond is not None else 0)]
        parts.append(
            _read_rows(backbone, config, taps, posteriors, shown, texts, compiled, attention, reuse)
        )
        return [tuple(parts[0][name][row] for name in taps) for row in range(len(missing))]

    halves: dict[str, Maps | None] = {"uncond": None, "cond": None}
    if uncond is not None:
        options = (tuple(taps), config.timestep, config.draws, config.noise, config.seed)
        run = None if compiled is None else object_key(compiled)
        shared = (state, run, *options, config.posterior, config.discard)
        rows = recall(
            None if state is None else backbone.caches.features,
            [(*shared, config.uncond, *key) for key in keys or [()] * batch],
            read,
        )
        halves["uncond"] = {
            name: torch.stack([row[tap] for row in rows]) for tap, name in enumerate(taps)
        }
    if cond is not None:
        if not parts:  # nothing was missing
            read([])
        halves["cond"] = {name: maps[-batch:].clone() for name, maps in parts[0].items()}
    return halves


def _read_rows(
    backbone: Backbone,
    config: EncoderConfig,
    taps: Sequence[str],
    posteriors: Posteriors,
    shown: list[int],
    texts: list[PromptEmbeds],
    compiled: Any,
    attention: AttentionRead | None,
    reuse: Callable[[list[int]], Reuse | None],
) -> Maps:
    """Features of rows, mean over draws: (rows c h w), or (rows t c h w) for several steps.

    Args:
        backbone: Model whose U-Net is called.
        config: Config that gives the timesteps, draws, noise and seed.
        taps: Names of the taps: module paths of the U-Net, or "latents".
        posteriors: Mode and deviation of the latents of all pictures.
        shown: Index of the picture that each row shows.
        texts: Encoded texts of the rows, in order.
        compiled: Compiled U-Net that `compiled_taps` returned, or None.
        attention: Cross-attention that is read in the same pass; None reads none.
        reuse: Function that says what of the pass is reused, for rows that show these pictures.
    """
    if not shown:
        return {}
    steps, draws, rows = config.timesteps, config.draws, len(shown)
    clean = [
        draw_latents(*posteriors, config.posterior, seed=config.seed, draw=d)[shown]
        for d in range(draws)
    ]
    repeats = len(steps) * draws
    maps: Maps = {}
    names = [tap for tap in taps if tap != LATENTS]
    layers = () if attention is None else attention.layers
    if names or layers:
        noisy_latents = [
            _noised(backbone, config, clean[draw], step, draw)
            for step in steps
            for draw in range(draws)
        ]
        maps = read_taps(
            backbone,
            torch.cat(noisy_latents),
            torch.tensor(steps, dtype=torch.long, device="cpu").repeat_interleave(draws * rows),
            PromptEmbeds.concat(texts * repeats),
            names,
            batch_size=config.batch_size,
            compiled=compiled,
            attention=attention,
            reuse=reuse(shown),
            packed=() if config.discard is None else names,
        )
    if LATENTS in taps:
        maps[LATENTS] = torch.cat(clean * len(steps)).to(backbone.device, backbone.dtype)
        require_finite(maps[LATENTS], "latents", "load the model with dtype=torch.float32")
    one = isinstance(config.timestep, int)
    ordered = {name: maps[name] for name in [*taps, *map(attention_key, layers)]}
    if repeats == 1 and one:
        return _discarded(backbone, config, ordered)
    split = "(t d b) c h w -> b t d c h w"
    means = {
        name: rearrange(each, split, t=len(steps), d=draws).mean(dim=2)
        for name, each in ordered.items()
    }
    kept = {name: mean[:, 0] for name, mean in means.items()} if one else means
    return _discarded(backbone, config, kept)


def check_discard(discard: Sequence[int] | None, taps: Sequence[TapInfo]) -> None:
    """Raise a `ConfigError` unless channels can be discarded before what taps give.

    Args:
        discard: Channels; None reads taps as they are.
        taps: Taps of the encoder.
    """
    if discard is None:
        return
    for tap in taps:
        if tap.name != LATENTS and not is_adaptive_norm(tap.name):
            raise ConfigError(
                f"discard zeroes channels before an adaptive norm, and {tap.name!r} is none; read "
                "taps such as 'single_transformer_blocks.9.norm' of FLUX, or leave discard out"
            )
        if beyond := [channel for channel in discard if channel >= tap.channels]:
            raise ConfigError(
                f"there is no channel {beyond[0]} at {tap.name!r}, which has {tap.channels}; "
                "massive channels belong to a model: Features.massive_channels finds them, and "
                "discard=() zeroes none"
            )


def _discarded(backbone: Backbone, config: EncoderConfig, maps: Maps) -> Maps:
    """Maps behind the adaptive norms that were read, where channels are discarded before them."""
    if config.discard is None:
        return maps
    modules = backbone.denoiser.get_submodule
    return {
        name: each if name == LATENTS else normed(modules(name), each, config.discard)
        for name, each in maps.items()
    }


def _reuse(
    backbone: Backbone,
    config: EncoderConfig,
    taps: Sequence[str],
    layers: Sequence[str],
    pictures: Sequence[tuple[object, ...]] | None,
    textless: PromptEmbeds | None,
    shown: list[int],
) -> Reuse | None:
    """What of a pass is reused.

    Args:
        backbone: Model whose U-Net is called.
        config: Config that gives the timesteps, draws, noise, seed and `reuse`.
        taps: Names of the taps.
        layers: Module paths of cross-attentions that are read.
        pictures: Keys of the pictures and of the model's state; None keeps nothing.
        textless: Unconditional embeddings, one row per picture.
        shown: Index of the picture that each row shows.
    """
    common = (config.noise, config.seed, config.posterior)
    places = [
        (*common, step, draw, row if pictures is None else pictures[row])
        for step in config.timesteps
        for draw in range(config.draws)
        for row in shown
    ]
    cache = None if pictures is None else backbone.caches.outputs
    if config.reuse is None or textless is None:
        return prefix_of(backbone, places, cache, read=[*taps, *layers])
    check_reuse(backbone, config.reuse, taps, layers)
    repeats = len(config.timesteps) * config.draws
    texts = PromptEmbeds.concat([textless.take(shown)] * repeats)
    keys = [(config.uncond, *place) for place in places]
    return without_text(backbone, config.reuse, keys, cache, texts)


def _noised(
    backbone: Backbone, config: EncoderConfig, latents: Tensor, timestep: int, draw: int
) -> Tensor:
    if config.noise is None:
        return latents
    _, c, h, w = latents.shape
    noise = shared_noise((c, h, w), seed=config.seed, timestep=timestep, draw=draw)
    return add_noise(backbone.scheduler, latents, noise, timestep)
