"""The folder that a scorer is saved to: config, reference images, where its backbone comes from."""

import os
from pathlib import Path
from typing import Any

import torch

from diffenc.backbones.base import Backbone
from diffenc.errors import BackboneError, ConfigError
from diffenc.saved import merge_parts
from diffenc.scoring.calibration import References
from diffenc.scoring.config import ScorerConfig
from diffenc.storage.names import is_file
from diffenc.storage.reading import read_json
from diffenc.storage.schema import checked
from diffenc.storage.tensors import read_tensors, write_tensors
from diffenc.storage.writing import begin_folder, remove_file, write_json

CONFIG_FILE = "scorer_config.json"
REFERENCES_FILE = "references.safetensors"


def is_saved_scorer(name: "str | os.PathLike[str]") -> bool:
    """Whether a folder of that name holds a scorer."""
    return is_file(Path(name) / CONFIG_FILE)


def write_scorer(
    folder: Path, backbone: Backbone, config: ScorerConfig, references: References | None
) -> None:
    """Write a config, its reference images and a reference to the backbone.

    Raises:
        OutputError: The folder cannot be written.
    """
    content: dict[str, Any] = {"backbone": backbone.name}
    if backbone.given:
        content["parts"] = backbone.given
    content.update(config.to_dict())
    begin_folder(folder, CONFIG_FILE)
    if references is not None:
        write_tensors(folder / REFERENCES_FILE, {"pictures": references.pictures})
    else:
        remove_file(folder / REFERENCES_FILE)
    write_json(folder / CONFIG_FILE, content)


def read_scorer(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any], References | None]:
    """Options, name of the backbone, parts given in place of its own, and reference images.

    Raises:
        BackboneError: The files are not those that `write_scorer` wrote.
        ConfigError: A part was given as an object, which cannot be found again.
    """
    path = folder / CONFIG_FILE
    try:
        values = read_json(path)
        backbone = checked(values.pop("backbone"), str, "backbone")
        parts = checked(values.pop("parts", {}), dict[str, str | None], "parts")
    except (ConfigError, KeyError) as error:
        raise BackboneError(
            f"{path} is not a config that CrossAttnScorer.save_pretrained wrote: {error}"
        ) from error
    return values, backbone, merge_parts(parts, {}, folder), _read_references(folder)


def _read_references(folder: Path) -> References | None:
    path = folder / REFERENCES_FILE
    if not is_file(path):
        return None
    pictures = read_tensors(path, error=BackboneError).get("pictures")
    shaped = pictures is not None and pictures.ndim == 4 and pictures.shape[1] == 3
    if pictures is None or not shaped or not pictures.numel() or pictures.dtype != torch.uint8:
        raise BackboneError(f"{path} holds no reference images: bytes (images, 3, height, width)")
    return References(pictures)
