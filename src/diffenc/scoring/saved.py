"""The folder that a scorer is saved to: config, reference images, where its backbone comes from."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffenc.errors import BackboneError, ConfigError, DiffencError
from diffenc.models.base import Backbone
from diffenc.models.encoder_folder import merge_parts, read_parts, read_source, stored_parts
from diffenc.models.sources import SOURCES
from diffenc.scoring.calibration import References
from diffenc.scoring.config import ScorerConfig
from diffenc.storage.names import expanded, is_file, printable
from diffenc.storage.pretrained import stored_name
from diffenc.storage.reading import read_json
from diffenc.storage.schema import checked
from diffenc.storage.tensors import read_tensors, write_tensors
from diffenc.storage.writing import begin_folder, remove_file, write_json

CONFIG_FILE = "scorer_config.json"
REFERENCES_FILE = "references.safetensors"


def is_saved_scorer(name: "str | os.PathLike[str]") -> bool:
    """Whether a folder of that name holds a scorer."""
    if isinstance(name, str) and name in SOURCES:  # no folder, whatever lies beside
        return False
    return is_file(expanded(name) / CONFIG_FILE)


def write_scorer(
    folder: Path, backbone: Backbone, config: ScorerConfig, references: References | None
) -> None:
    """Write a config, its reference images and a reference to the backbone.

    Raises:
        OutputError: The folder cannot be written.
    """
    content: dict[str, Any] = {"backbone": stored_name(backbone.name, folder)}
    if backbone.variant is not None:
        content["variant"] = backbone.variant
    if backbone.replacements:
        content["parts"] = stored_parts(backbone.replacements, folder)
    content["mark"] = backbone.mark()
    content.update(config.to_dict())
    begin_folder(folder, CONFIG_FILE)
    if references is not None:
        write_tensors(folder / REFERENCES_FILE, {"pictures": references.pictures})
    else:
        remove_file(folder / REFERENCES_FILE)
    write_json(folder / CONFIG_FILE, content)


@dataclass(frozen=True, slots=True)
class SavedScorer:
    """What the folder of a scorer says.

    Attributes:
        options: Options of `ScorerConfig`.
        backbone: Name of the backbone.
        parts: Parts given in place of its own.
        references: Reference images, or None.
        mark: Numbers of each part of the backbone, by which it is known again.
    """

    options: dict[str, Any]
    backbone: str
    parts: dict[str, Any]
    references: References | None
    mark: dict[str, Any]


def read_scorer(folder: Path) -> SavedScorer:
    """What `write_scorer` wrote.

    Raises:
        BackboneError: The files are not those that `write_scorer` wrote.
        ConfigError: A part was given as an object, which cannot be found again.
    """
    path = folder / CONFIG_FILE
    try:
        values = read_json(path)
        backbone = checked(values.pop("backbone"), str, "backbone")
        parts = checked(values.pop("parts", {}), dict[str, str | None], "parts")
        mark = checked(values.pop("mark", {}), dict[str, list[float]], "mark")
        variant = checked(values.pop("variant", None), str | None, "variant")
    except (ConfigError, KeyError) as error:
        raise BackboneError(
            f"{path} is not a config that CrossAttnScorer.save_pretrained wrote: {error}"
        ) from error
    options = {**merge_parts(read_parts(parts, folder), {}, folder), "variant": variant}
    return SavedScorer(
        values, read_source(backbone, folder), options, _read_references(folder), mark
    )


def _read_references(folder: Path) -> References | None:
    path = folder / REFERENCES_FILE
    if not is_file(path):
        return None
    tensors = read_tensors(path, error=BackboneError)
    try:
        if tensors.keys() != {"pictures"}:
            raise ConfigError(f"it holds {printable(sorted(tensors), 80)}, and must hold pictures")
        return References(tensors["pictures"])
    except DiffencError as error:
        raise BackboneError(f"cannot read the reference images in {path}: {error}") from error
