"""Reading a diffusers folder: which model it is, its parts, and clear errors where it is broken."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffenc.errors import BackboneError
from diffenc.models.base import Backbone
from diffenc.models.config_checks import check_config
from diffenc.models.configs import Architecture
from diffenc.models.families import FAMILIES, make_backbone
from diffenc.models.family_files import (
    FAMILY_FILES,
    PARTS,
    FamilyFiles,
    classes_of,
    family_of_configs,
)
from diffenc.models.parts import GivenParts, fitting_tokenizer, load_tokenizer
from diffenc.models.schedules import make_scheduler
from diffenc.models.stored import load_stored, read_plain, stem_of
from diffenc.models.variants import pipeline_family
from diffenc.storage.folder_kinds import kind_of_folder
from diffenc.storage.names import is_file, is_folder, printable
from diffenc.storage.reading import read_json
from diffenc.storage.remote_code import refuse_remote_code
from diffenc.storage.weights import HALF, list_folder, variants


def read_model_index(folder: Path) -> tuple[str, dict[str, Any]]:
    """Family and content of a folder's `model_index.json`.

    Raises:
        BackboneError: No folder, no or a broken index, or a pipeline that diffenc cannot read.
    """
    index_file = folder / "model_index.json"
    if not is_folder(folder):
        raise BackboneError(f"no such model folder: {folder}")
    if not is_file(index_file) and (kind := kind_of_folder(folder)):
        raise BackboneError(f"{folder} is no diffusers folder: it holds {kind}")
    if not is_file(index_file):
        raise BackboneError(
            f"{folder} is no diffusers folder: it has no model_index.json. Pass the folder that "
            "holds unet/ or transformer/, vae/, text_encoder/, tokenizer/ and scheduler/."
        )
    try:
        index = read_json(index_file, object, error=BackboneError, finite=False)
    except BackboneError as error:
        raise BackboneError(f"{index_file} is broken: {error}") from error
    refuse_remote_code(folder)
    pipeline = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(pipeline, str):
        raise BackboneError(f"{index_file} is broken: it names no pipeline under _class_name")
    for part in sorted(PARTS):
        _check_origin(index.get(part), part, folder)
    family = pipeline_family(index, str(folder))
    parts = FAMILY_FILES[family].parts_in(index)
    missing = [part for part in parts if not is_folder(folder / part)]
    if missing:
        raise BackboneError(f"{folder} is incomplete: it lacks {', '.join(missing)}")
    for part in parts:
        refuse_remote_code(folder / part)  # before the weights of another part are read
    return family, index


def _check_origin(origin: Any, part: str, folder: Path) -> None:
    """Raise where an index names a class for a part that is of neither library."""
    if origin is None:
        return
    if not isinstance(origin, list) or len(origin) != 2:
        raise BackboneError(
            f"{folder / 'model_index.json'} is broken: {part} must be a library and a class, got "
            f"{printable(origin, 80)}"
        )
    if origin[0] not in ("diffusers", "transformers", None):
        raise BackboneError(
            f"{folder} takes its {part} from {printable(origin[0], 80)}, code that diffenc does "
            "not run; it reads models of diffusers and transformers"
        )


def read_config(folder: Path, part: str, family: str | None = None) -> dict[str, Any]:
    """A part's JSON config.

    Args:
        folder: Folder of the model.
        part: Name of the part.
        family: Family of the model; None for a part by itself.

    Raises:
        BackboneError: It is missing or broken, or no config of such a part.
    """
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return check_config(read_plain(folder / part / name), part, folder, family)


def read_architecture(folder: Path, *, own_taps: tuple[str, ...] | None = None) -> Architecture:
    """What a folder's configs tell; no weights are needed.

    Raises:
        BackboneError: The folder is missing, incomplete or broken.
    """
    family, index = read_model_index(folder)
    parts = FAMILY_FILES[family].parts_in(index)
    names = [part for part in parts if not part.startswith("tokenizer")]
    configs = {name: read_config(folder, name, family) for name in names}
    own_family = None if family == family_of_configs(configs) else family
    return Architecture(configs, own_taps, own_family)


def load_folder(
    folder: Path,
    *,
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    described: Architecture,
    keep_taps: Sequence[str] | None = None,
    replaced: GivenParts | None = None,
    variant: str | None = None,
) -> Backbone:
    """Load every part of a diffusers folder that is not given.

    Args:
        folder: Folder that holds `model_index.json`.
        name: Name of the backbone in messages and configs.
        dtype: Floating point type of the U-Net and the text encoders; the VAE stays in float32
            where half precision overflows.
        device: Device of the parts.
        described: What the configs tell, with what is given in the place of parts.
        keep_taps: Module paths of the U-Net; what lies behind the last of them is not loaded. None
            loads everything.
        replaced: Parts that take the place of the folder's; None takes all from the folder.
        variant: Word in the names of the weight files, such as "fp16"; parts without such files are
            read from those that they have. "" names the files without a word. None takes these, and
            those in half precision where there are no others or float16 is asked for.

    Raises:
        BackboneError: The folder is missing, incomplete or broken, or names another kind of model.
    """
    replaced = replaced or GivenParts()
    family, index = read_model_index(folder)
    files = FAMILY_FILES[family]
    named = part_variants(folder, _weighty(files, index), variant)
    parts, halves = {}, []
    for part in files.parts_in(index):
        loaded = replaced.load(part, described, dtype=dtype, keep_taps=keep_taps)
        if loaded is None and part in named:
            loaded, taken = load_stored(
                folder / part,
                part,
                dtype,
                variant=named[part],
                keep_taps=keep_taps,
                family=family,
            )
            halves += [part] * (taken == HALF != named[part] and dtype == torch.float32)
        elif loaded is None:
            loaded = _load_part(folder, part, family)
        parts[part] = loaded
    if halves:
        warnings.warn(
            f"{name} has its {', '.join(halves)} in half precision alone: its weights are rounded "
            "to float16, whatever they are computed in",
            stacklevel=2,
        )
    return assemble(name, described, {**parts, **files.options_in(index)}, device)


def assemble(
    name: str, described: Architecture, parts: dict[str, Any], device: str | torch.device
) -> Backbone:
    """A backbone of loaded parts, on a device.

    Raises:
        BackboneError: Parts do not fit each other.
    """
    for part in [part for part in parts if part.startswith("tokenizer")]:
        encoder = parts[part.replace("tokenizer", "text_encoder")]
        parts[part] = fitting_tokenizer(parts[part], encoder)
    for part, module in parts.items():
        if isinstance(module, torch.nn.Module):
            parts[part] = module.to(device)
    return make_backbone(name, described, parts)


def read_tokenizer(folder: Path) -> Any:
    """The first tokenizer of a folder, as the model reads texts with it; no weights are needed.

    Raises:
        BackboneError: The folder is missing, incomplete or broken.
    """
    family, index = read_model_index(folder)
    limit = read_config(folder, "text_encoder", family).get("max_position_embeddings")
    tokenizer = load_tokenizer(folder, classes=classes_of("tokenizer", family))
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return FAMILIES[family].fitted_tokenizer(tokenizer, index["_class_name"])


def weighty_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """Parts of a folder that have weights, not its tokenizers and scheduler, and their configs.

    Raises:
        BackboneError: See `read_model_index`.
    """
    family, index = read_model_index(folder)
    weighty = _weighty(FAMILY_FILES[family], index)
    return {part: read_config(folder, part, family) for part in weighty}


def _weighty(files: FamilyFiles, index: dict[str, Any]) -> list[str]:
    """Those of a folder's parts that have weights."""
    return [part for part in files.parts_in(index) if part in files.weighty]


def part_variants(
    folder: Path,
    parts: Sequence[str],
    variant: str | None,
    listing: Sequence[str] | None = None,
) -> dict[str, str | None]:
    """The variant to read of each part: the requested one where it has that, else None.

    Args:
        folder: Folder of the model.
        parts: Names of the model's parts that have weights.
        variant: Variant that is requested; None requests none.
        listing: Paths of all files relative to the folder; None looks there.

    Raises:
        BackboneError: A variant is requested that no part has.
    """
    if not variant:
        return dict.fromkeys(parts, variant)
    known = {part: variants(_names_in(folder, part, listing), stem_of(part)) for part in parts}
    if not any(variant in words for words in known.values()):
        every = sorted({word for words in known.values() for word in words})
        raise BackboneError(
            f"{folder} has no weights of the variant {variant!r}; it has variant="
            f"{' or '.join(map(repr, every)) or 'none at all'}"
        )
    return {part: variant if variant in words else None for part, words in known.items()}


def _names_in(folder: Path, part: str, listing: Sequence[str] | None) -> list[str]:
    if listing is None:
        return list_folder(folder / part)
    return [name.removeprefix(f"{part}/") for name in listing if name.startswith(f"{part}/")]


def _load_part(folder: Path, part: str, family: str) -> Any:
    try:
        if part == "scheduler":
            config, flow = read_config(folder, part, family), FAMILY_FILES[family].flow
            return make_scheduler(config, where=str(folder / part), flow=flow)
        return load_tokenizer(folder / part, classes=classes_of(part, family))
    except BackboneError:
        raise
    except Exception as error:  # the libraries raise anything from OSError to SafetensorError
        raise BackboneError(f"cannot load {folder / part}: {error}") from error
