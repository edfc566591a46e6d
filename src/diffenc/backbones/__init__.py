"""Models by name: aliases, Hub ids, local folders, single files; and by their parts."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffenc.backbones.base import Backbone
from diffenc.backbones.configs import Architecture, known_architecture
from diffenc.backbones.device import check_placement
from diffenc.backbones.folder import (
    assemble,
    load_folder,
    make_scheduler,
    read_architecture,
)
from diffenc.backbones.memory_format import arrange
from diffenc.backbones.parts import GivenParts, fitting_tokenizer, load_tokenizer
from diffenc.backbones.sd import StableDiffusion
from diffenc.backbones.sdxl import StableDiffusionXL
from diffenc.backbones.shapes import SHAPES_TAPS
from diffenc.backbones.single_file import SingleFile
from diffenc.backbones.sources import (
    SOURCES,
    BackboneSource,
    cached_folder,
    resolve_folder,
    single_file,
)
from diffenc.backbones.taps import TapInfo, match_taps
from diffenc.errors import BackboneError, ConfigError, near_matches

__all__ = [
    "Architecture",
    "Backbone",
    "BackboneSource",
    "StableDiffusion",
    "StableDiffusionXL",
    "TapInfo",
    "describe",
    "list_backbones",
    "list_taps",
    "load_backbone",
    "match_taps",
    "resolve_folder",
]


def list_backbones() -> tuple[BackboneSource, ...]:
    """Every alias with what it leads to."""
    return tuple(SOURCES.values())


def load_backbone(
    name: "str | os.PathLike[str] | Backbone",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    keep_taps: Sequence[str] | None = None,
    architecture: "str | os.PathLike[str] | None" = None,
    channels_last: bool | None = None,
    unet: Any = None,
    vae: Any = None,
    text_encoder: Any = None,
    text_encoder_2: Any = None,
    tokenizer: Any = None,
    tokenizer_2: Any = None,
) -> Backbone:
    """Load a model.

    Args:
        name: An alias of `list_backbones`, a Hub id ("owner/name"), a diffusers folder, a
            `.safetensors` checkpoint in the original layout, or a `Backbone`, which is returned as
            it is, moved to `device` and `dtype` not at all.
        dtype: Of U-Net and text encoders: float32, bfloat16 or float16.
        device: Where the parts go.
        keep_taps: Module paths of the U-Net; what lies behind the last of them is neither loaded
            nor run. None loads everything.
        architecture: For a single file: the alias or the diffusers folder whose configs describe
            it, where the file does not show that itself.
        channels_last: Memory format of convolutions; None takes what was measured to be fastest,
            see `diffenc.backbones.memory_format`.
        unet: Instead of the model's own: a `UNet2DConditionModel`, a state dict or a
            `.safetensors` file (CleanDIFT's, for one), with any prefix.
        vae: Instead of the model's own: an `AutoencoderKL` or `AutoencoderTiny` (TAESD), its
            folder, or a `.safetensors` file that fits the model's.
        text_encoder: Instead of the model's own: a `CLIPTextModel` or its folder.
        text_encoder_2: SDXL's second; a `CLIPTextModelWithProjection` or its folder.
        tokenizer: Instead of the model's own: a `CLIPTokenizer` or its folder. A single file needs
            it unless the Hub's cache has one of an alias.
        tokenizer_2: SDXL's second; a single file takes `tokenizer` for both.

    Raises:
        BackboneError: Unknown, not to be had, incomplete or broken; a part does not fit.
        ConfigError: The device or its support of `dtype` is missing, or options contradict.
    """
    given = GivenParts(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
    )
    if isinstance(name, Backbone):
        if given.references() or keep_taps is not None or architecture is not None:
            raise ConfigError(
                "a Backbone has its parts and is not truncated; pass the name that it is loaded "
                "by, or build another one of your parts"
            )
        return name if channels_last is None else arrange(name, channels_last)
    check_placement(device, dtype)
    told = _described(name, architecture, given)
    path = single_file(name)
    if path is not None:
        backbone = _load_single_file(path, architecture, told, given, dtype, device, keep_taps)
    else:
        backbone = load_folder(
            resolve_folder(name),
            name=os.fspath(name),
            dtype=dtype,
            device=device,
            own_taps=_own_taps(name),
            keep_taps=keep_taps,
            given=given,
        )
    backbone.given = given.references()
    if architecture is not None:
        backbone.given["architecture"] = os.fspath(architecture)
    return arrange(backbone, channels_last)


def _load_single_file(
    path: Path,
    architecture: "str | os.PathLike[str] | None",
    told: Architecture,
    given: GivenParts,
    dtype: torch.dtype,
    device: str | torch.device,
    keep_taps: Sequence[str] | None,
) -> Backbone:
    opened = SingleFile(path)
    alias = opened.known_alias() if architecture is None else os.fspath(architecture)
    parts: dict[str, Any] = {"scheduler": make_scheduler(told.configs["scheduler"])}
    for part in (part for part in told.configs if part != "scheduler"):
        loaded = given.load(part, told, dtype=dtype, keep_taps=keep_taps)
        if loaded is None:
            overflows = part == "vae" and told.configs[part].get("force_upcast", False)
            kept = torch.float32 if overflows and dtype == torch.float16 else dtype
            loaded = opened.part(part, told, dtype=kept, keep_taps=keep_taps)
        parts[part] = loaded
    for part in ("tokenizer", "tokenizer_2")[: 2 if told.family == "sdxl" else 1]:
        loaded = _tokenizer_of_file(path, part, alias, given, told)
        encoder = parts[part.replace("tokenizer", "text_encoder")]
        parts[part] = fitting_tokenizer(loaded, encoder, _PAD_TOKENS.get((alias, part)))
    return assemble(str(path), told, parts, device)


# What the published tokenizers pad with; those of other models that share the words may differ.
_PAD_TOKENS = {
    ("sd1.5", "tokenizer"): "<|endoftext|>",
    ("sd2.1-base", "tokenizer"): "!",
    ("sd2.1", "tokenizer"): "!",
    ("sdxl", "tokenizer"): "<|endoftext|>",
    ("sdxl", "tokenizer_2"): "!",
}


def _tokenizer_of_file(
    path: Path, part: str, alias: str, given: GivenParts, told: Architecture
) -> Any:
    """The given one, that of the folder with the configs, or one that the Hub's cache has."""
    for source in (getattr(given, part), given.tokenizer):
        if source is not None:
            is_path = isinstance(source, (str, os.PathLike))
            return load_tokenizer(source, part) if is_path else source
    if alias not in SOURCES:
        return load_tokenizer(Path(alias), part)
    # The words of all Stable Diffusions are the same: those of CLIP.
    for known in dict.fromkeys((alias, *SOURCES)):
        if folder := cached_folder(known, "tokenizer/vocab.json"):
            return load_tokenizer(folder)
    raise BackboneError(
        f"{path} holds no tokenizer, and the Hub's cache has none of {alias!r}. Pass tokenizer= "
        "with a folder that holds vocab.json and merges.txt, such as tokenizer/ of any Stable "
        "Diffusion in diffusers' layout or 'openai/clip-vit-large-patch14'."
    )


def describe(
    name: "str | os.PathLike[str]",
    *,
    architecture: "str | os.PathLike[str] | None" = None,
    unet: Any = None,
    vae: Any = None,
) -> Architecture:
    """What a model's configs tell, without its weights; for aliases without network too.

    Args:
        name: As for `load_backbone`.
        architecture: As for `load_backbone`.
        unet: As for `load_backbone`; a module's config counts.
        vae: As for `load_backbone`.

    Raises:
        BackboneError: See `load_backbone`.
    """
    return _described(name, architecture, GivenParts(unet=unet, vae=vae))


def _described(
    name: "str | os.PathLike[str]",
    architecture: "str | os.PathLike[str] | None",
    given: GivenParts,
) -> Architecture:
    path = single_file(name)
    if path is None and architecture is not None:
        raise ConfigError(
            f"architecture= is for a single file; {os.fspath(name)!r} has configs of its own"
        )
    if path is not None:
        opened = SingleFile(path)
        name = opened.known_alias() if architecture is None else architecture
    told = known_architecture(os.fspath(name))
    if told is None and path is not None and not Path(name).is_dir():
        raise BackboneError(
            f"unknown architecture {os.fspath(name)!r}.{near_matches(os.fspath(name), SOURCES)} "
            "Pass 'sd1.5', 'sd2.1-base', 'sd2.1', 'sdxl', or a diffusers folder."
        )
    if told is None:
        told = read_architecture(resolve_folder(name, weights=False), own_taps=_own_taps(name))
    return given.described(told)


def list_taps(name: "str | os.PathLike[str] | Backbone") -> tuple[TapInfo, ...]:
    """Every readable place of a model's U-Net, without its weights.

    Raises:
        BackboneError: See `load_backbone`.
    """
    return name.taps() if isinstance(name, Backbone) else describe(name).taps()


def _own_taps(name: "str | os.PathLike[str]") -> tuple[str, ...] | None:
    return SHAPES_TAPS if os.fspath(name) == "shapes" else None
