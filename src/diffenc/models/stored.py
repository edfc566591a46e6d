"""Parts of a diffusers folder: their weights, from whichever files hold them, checked by config."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffenc.errors import BackboneError
from diffenc.models.building import build_part
from diffenc.models.config_checks import check_config
from diffenc.models.weights import (
    State,
    fit_diffusers,
    fit_text_encoder,
    load_denoiser,
    load_into,
)
from diffenc.runtime.precision import fitting_dtype
from diffenc.storage.reading import read_json
from diffenc.storage.remote_code import refuse_remote_code
from diffenc.storage.weights import DIFFUSERS, TRANSFORMERS, open_weights


def part_dtype(part: str, config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """Type of a part's weights; another than is asked for where a VAE or a text encoder overflows.

    Args:
        part: Name of the part.
        config: Its config, as JSON holds it.
        dtype: Type that is asked for.
    """
    return dtype if part in ("unet", "transformer") else fitting_dtype(config, dtype)


def stem_of(part: str) -> str:
    """What the weight files of a part are called."""
    return TRANSFORMERS if part.startswith("text_encoder") else DIFFUSERS


def read_plain(path: Path) -> dict[str, Any]:
    """Content of a config file, which may hold infinities: the schedulers of diffusers write them.

    Raises:
        BackboneError: It is missing, broken, or holds no object.
    """
    try:
        config: dict[str, Any] = read_json(path, error=BackboneError, finite=False)
    except BackboneError as error:
        why = str(error).removeprefix(f"cannot read {path}: ").removeprefix(f"{path} ")
        raise BackboneError(f"cannot read {path}: {why}") from error
    return config


def read_vae_config(folder: Path) -> dict[str, Any]:
    """The config of a VAE's own folder.

    Raises:
        BackboneError: It is missing, broken, or of another kind of model.
    """
    try:
        config = read_plain(folder / "config.json")
    except BackboneError as error:
        raise BackboneError(f"cannot read the VAE's config in {folder}: {error}") from error
    if "_class_name" not in config:
        raise BackboneError(f"{folder} holds no VAE: its config.json has no _class_name")
    return check_config(config, "vae", folder)


def load_stored(
    folder: Path,
    part: str,
    dtype: torch.dtype,
    *,
    variant: str | None = None,
    keep_taps: Sequence[str] | None = None,
    family: str | None = None,
) -> tuple[Any, str]:
    """A denoiser, VAE or text encoder from its own folder, and the variant that was read.

    Args:
        folder: Folder of the part.
        part: Name of the part, such as "unet", "vae" or "text_encoder_2".
        dtype: Floating point type of the weights; what overflows in float16 is put in another,
            see `diffenc.runtime.precision`.
        variant: Word in the names of the weight files, see
            `diffenc.storage.weights.choose_weights`.
        keep_taps: Module paths of the denoiser; what lies behind the last of them is left out. None
            keeps all.
        family: Family of the model; None for a part by itself.

    Raises:
        BackboneError: The folder is missing or broken, its weights do not fit its config, or it
            asks for code to be run.
    """
    refuse_remote_code(folder)
    whole = folder.parent if folder.name == part else folder
    config = check_config(read_plain(folder / "config.json"), part, whole, family)
    dtype = part_dtype(part, config, dtype)
    half = dtype == torch.float16
    state, taken = open_weights(folder, stem_of(part), variant=variant, half=half)
    what = str(folder)
    if part in ("unet", "transformer"):
        return load_denoiser(config, state, what=what, dtype=dtype, keep_taps=keep_taps), taken
    if part == "vae":
        return load_vae(config, state, what=what, dtype=dtype), taken
    return load_text_encoder(config, state, part, what=what, dtype=dtype, family=family), taken


def load_vae(config: dict[str, Any], state: State, *, what: str, dtype: torch.dtype) -> Any:
    """A VAE with these weights.

    Args:
        config: Config of an `AutoencoderKL` or `AutoencoderTiny`.
        state: Weights under diffusers' names.
        what: Source of the weights, for messages.
        dtype: Floating point type of the weights.

    Raises:
        BackboneError: A weight is missing, unknown, or of another shape.
    """
    return load_into(
        lambda: build_part("vae", config), state, what=what, dtype=dtype, fit=fit_diffusers
    )


def load_text_encoder(
    config: dict[str, Any],
    state: State,
    name: str,
    *,
    what: str,
    dtype: torch.dtype,
    family: str | None = None,
) -> Any:
    """A text encoder with these weights; the second of SDXL has a projection.

    Args:
        config: Config of the text encoder.
        state: Weights under transformers' names, of any version.
        name: Name of the part, such as "text_encoder_2".
        what: Source of the weights, for messages.
        dtype: Floating point type of the weights.
        family: Family of the model; None for a part by itself.

    Raises:
        BackboneError: A weight is missing, unknown, or of another shape.
    """
    return load_into(
        lambda: build_part(name, config, family),
        state,
        what=what,
        dtype=dtype,
        fit=fit_text_encoder,
    )
