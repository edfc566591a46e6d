"""The folder that a scorer is saved to: config, reference images, where its backbone comes from."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffenc.backbones.base import Backbone
from diffenc.backbones.sources import SOURCES
from diffenc.errors import BackboneError, OutputError
from diffenc.pretrained import stored_name
from diffenc.saved import merge_parts, read_parts, read_source, stored_parts
from diffenc.scoring.calibration import References
from diffenc.scoring.config import ScorerConfig
from diffenc.storage.names import is_file

CONFIG_FILE = "scorer_config.json"
REFERENCES_FILE = "references.safetensors"


def is_saved_scorer(name: "str | os.PathLike[str]") -> bool:
    """Whether a folder of that name holds a scorer."""
    if isinstance(name, str) and name in SOURCES:  # no folder, whatever lies beside
        return False
    return is_file(Path(name).expanduser() / CONFIG_FILE)


def write_scorer(
    folder: Path, backbone: Backbone, config: ScorerConfig, references: References | None
) -> None:
    """Write a config, its reference images and a reference to the backbone.

    Raises:
        OutputError: The folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    content: dict[str, Any] = {"backbone": stored_name(backbone.name, folder)}
    if backbone.given:
        content["parts"] = stored_parts(backbone.given, folder)
    content["mark"] = backbone.mark()
    content.update(config.to_dict())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REFERENCES_FILE).unlink(missing_ok=True)
        if references is not None:
            save_file({"pictures": references.pictures}, folder / REFERENCES_FILE)
        partial = folder / f"{CONFIG_FILE}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / CONFIG_FILE)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {folder}: {error}") from error


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
        values = json.loads(path.read_text(encoding="utf-8"))
        backbone = values.pop("backbone")
        parts, mark = dict(values.pop("parts", {})), dict(values.pop("mark", {}))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BackboneError(
            f"{path} is not a config that CrossAttnScorer.save_pretrained wrote: {error!r}"
        ) from error
    return SavedScorer(
        values,
        read_source(backbone, folder),
        merge_parts(read_parts(parts, folder), {}, folder),
        _read_references(folder),
        mark,
    )


def _read_references(folder: Path) -> References | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / REFERENCES_FILE
    if not path.is_file():
        return None
    try:
        return References(load_file(path)["pictures"])
    except (OSError, KeyError, SafetensorError) as error:
        raise BackboneError(f"cannot read the reference images in {path}: {error}") from error
