"""Which places of a denoiser can be read, with channels and reduction, from its config alone."""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from inspect import signature
from json import dumps, loads
from typing import Any

import torch

from diffenc.checks.arguments import entries
from diffenc.denoiser.hooks import ForwardTaps
from diffenc.denoiser.shape_pass import ShapePass
from diffenc.denoiser.shortening import shortened
from diffenc.denoiser.transformers import layout_of, word_for
from diffenc.errors import BackboneError, ConfigError, TapError, near_matches
from diffenc.models.denoisers import (
    UNET,
    build_denoiser,
    config_of,
    latent_channels,
    meta_inputs,
    probed_side,
)
from diffenc.models.shapes import SHAPES_TAPS_FILE, shapes_folder
from diffenc.models.tap_names import gdf_name, is_literature_name, spelled_out
from diffenc.runtime.inference import lasting
from diffenc.storage.names import printable, reason
from diffenc.storage.reading import read_json

_TRANSFORMER = (
    r"attentions\.\d+(\.transformer_blocks\.\d+(\.attn1\.to_[qkv]|\.attn2\.to_q|\.ff(\.net\.0)?)?)?"
)
_BLOCK = rf"(\.resnets\.\d+(\.conv2)?|\.{_TRANSFORMER}|\.(up|down)samplers\.0)?"
_READABLE = re.compile(rf"conv_in|(down_blocks\.\d+|up_blocks\.\d+|mid_block){_BLOCK}")

LATENTS = "latents"
"""Tap of the VAE's latents, scaled and without noise; no module of the U-Net has this name."""


@dataclass(frozen=True, slots=True)
class TapInfo:
    """A place in the denoiser, or before it.

    Attributes:
        name: Module path of the module whose output is read, or "latents" for the latents of the
            VAE.
        channels: Number of channels of the feature map.
        reduction: Image pixels per side of a feature cell (nominal: for sides that divide evenly).
    """

    name: str
    channels: int
    reduction: int


def denoiser_taps(config: dict[str, Any], vae_reduction: int) -> tuple[TapInfo, ...]:
    """Every readable place of a denoiser with this config, in module order.

    Shapes come from a pass on the meta device: no weights, no memory. Those of the bundled model
    lie beside its weights.

    Args:
        config: Config of the denoiser as JSON holds it, with its class where that is no
            `UNet2DConditionModel`.
        vae_reduction: Image pixels per latent cell.
    """
    try:
        return _denoiser_taps(_with_defaults(config), vae_reduction)
    except Exception as error:  # of any kind, by the value that is wrong
        raise BackboneError(
            f"no {word_for(config)} can be built by this config: {reason(error)}; pass one of a "
            f"{config.get('_class_name', UNET)}"
        ) from error


def _with_defaults(config: dict[str, Any]) -> str:
    """One text for a config file and the config of the model that it makes, as a key of caches."""
    import diffusers

    kind = config.get("_class_name", UNET) if layout_of(config) else UNET
    arguments = signature(getattr(diffusers, kind).__init__).parameters
    whole = {name: config.get(name, arguments[name].default) for name in list(arguments)[1:]}
    return dumps({**whole, "_class_name": kind}, sort_keys=True)


@cache
def _denoiser_taps(config: str, vae_reduction: int) -> tuple[TapInfo, ...]:
    bundled, taps = _bundled_taps()
    if config == bundled and taps[0].reduction == vae_reduction:
        return taps
    return derived_taps(config, vae_reduction)


@cache
def _bundled_taps() -> tuple[str, tuple[TapInfo, ...]]:
    """Config of the bundled U-Net, and its places as they are written down beside it."""
    config = read_json(shapes_folder() / "unet" / "config.json", error=BackboneError)
    table = read_json(SHAPES_TAPS_FILE, error=BackboneError)
    return _with_defaults(config), tuple(TapInfo(name, *sizes) for name, sizes in table.items())


@lasting
def derived_taps(config: str, vae_reduction: int) -> tuple[TapInfo, ...]:
    """Every readable place of a denoiser, by a pass on the meta device.

    Args:
        config: Config of the denoiser in JSON, with its class.
        vae_reduction: Image pixels per latent cell.
    """
    values = loads(config)
    with torch.device("meta"):
        denoiser = build_denoiser(values).float().eval()
    layout = layout_of(values)
    readable = _READABLE.fullmatch if layout is None else layout.is_readable
    names = [name for name, _ in denoiser.named_modules() if readable(name)]
    side = probed_side(values)
    inputs = meta_inputs(config_of(denoiser), side)
    with torch.no_grad(), ForwardTaps(denoiser, names) as taps, ShapePass():
        maps = taps.run(lambda: denoiser(**inputs))
    latents = TapInfo(LATENTS, latent_channels(config_of(denoiser)), vae_reduction)
    return latents, *(
        TapInfo(name, features.shape[1], vae_reduction * side // features.shape[2])
        for name, features in maps.items()
    )


def count_parameters(config: dict[str, Any], taps: Sequence[str] | None = None) -> int:
    """Parameters of a denoiser with this config: of all of it, or of what some taps need.

    Args:
        config: Config of the denoiser as JSON holds it, with its class where that is no
            `UNet2DConditionModel`.
        taps: Module paths; None counts everything. What lies behind the last of them is what
            `truncate=True` neither loads nor runs.
    """
    with torch.device("meta"):
        denoiser = build_denoiser(config)
    kept = denoiser if taps is None else shortened(denoiser, taps)
    return sum(parameter.numel() for parameter in kept.parameters())


def tap_patterns(taps: object) -> tuple[str, ...]:
    """Module paths or globs as a tuple, from one of them or from several in an order.

    Raises:
        ConfigError: There is none, something that is no text, or a set, whose order is not the
            same in the next run.
    """
    if isinstance(taps, str):
        return (taps,)
    if isinstance(taps, (bytes, Set, Mapping)) or not isinstance(taps, Iterable):
        raise ConfigError(
            "taps must be module paths in the order in which their features are returned, as a "
            f"list or a tuple, got {type(taps).__name__}"
        )
    patterns = tuple(entries(taps))
    if other := [tap for tap in patterns if not isinstance(tap, str)]:
        raise ConfigError(
            f"taps must be module paths, as text, got {printable(repr(other[0]))}; "
            "diffenc.list_taps(backbone) gives every valid name"
        )
    if not patterns:
        raise ConfigError(
            "taps must be a tuple of module paths with at least one entry, got none; leave taps "
            "out for those of the model"
        )
    return patterns


def match_taps(patterns: Sequence[str], known: Sequence[TapInfo]) -> tuple[TapInfo, ...]:
    """The places that module paths or globs name, in the order given, each once.

    In a glob, `*` stays within one part of the path: "up_blocks.*" are the blocks themselves. Names
    of GDF and of the paper are taken too, see `diffenc.models.tap_names`.

    Args:
        patterns: Module paths, globs or names, one or several.
        known: Readable places, see `diffenc.list_taps`.

    Raises:
        TapError: A pattern names nothing; the message offers near matches.
        ConfigError: There is no pattern, or something that is none.
    """
    matched: dict[str, TapInfo] = {}
    for pattern in tap_patterns(patterns):
        matches = (
            _named(pattern, known) if is_literature_name(pattern) else _globbed(pattern, known)
        )
        matched.update((tap.name, tap) for tap in matches)
    return tuple(matched.values())


def _globbed(pattern: str, known: Sequence[TapInfo]) -> list[TapInfo]:
    parts = pattern.split(".")
    matches = [
        tap
        for tap in known
        if len(tap.name.split(".")) == len(parts)
        and all(map(fnmatchcase, tap.name.split("."), parts))
    ]
    if not matches:
        hint = near_matches(pattern[:200], [tap.name for tap in known])
        raise TapError(
            f"no tap matches {printable(pattern)!r}.{hint} "
            "diffenc.list_taps(backbone) gives every valid name; * stands for one part of it."
        )
    return matches


def _named(name: str, known: Sequence[TapInfo]) -> list[TapInfo]:
    names = {gdf_name(tap.name): tap for tap in known}
    gdf = spelled_out(name)
    if gdf in names:
        return [names[gdf]]
    if gdf.endswith(("-cross-k", "-cross-v", "-map")):
        raise TapError(
            f"{printable(name)!r} has no map of the picture: keys and values of cross-attention "
            "are of the text, and attention itself is read by scorer.word_maps"
        )
    near = near_matches(gdf[:200], [each for each in names if each])
    raise TapError(
        f"no tap of this model is called {printable(name)!r}.{near} diffenc.list_taps(backbone) "
        "gives every module path"
    )
