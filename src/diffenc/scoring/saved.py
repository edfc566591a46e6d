"""The folder that a scorer is saved to: config, reference images, where its backbone comes from."""

import json
import os
from pathlib import Path
from typing import Any

from diffenc.backbones.base import Backbone
from diffenc.errors import BackboneError, OutputError
from diffenc.saved import merge_parts
from diffenc.scoring.calibration import References
from diffenc.scoring.config import ScorerConfig

CONFIG_FILE = "scorer_config.json"
REFERENCES_FILE = "references.safetensors"


def is_saved_scorer(name: "str | os.PathLike[str]") -> bool:
    """Whether a folder of that name holds a scorer."""
    return (Path(name) / CONFIG_FILE).is_file()


def write_scorer(
    folder: Path, backbone: Backbone, config: ScorerConfig, references: References | None
) -> None:
    """Write a config, its reference images and a reference to the backbone.

    Raises:
        OutputError: The folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    content: dict[str, Any] = {"backbone": backbone.name}
    if backbone.given:
        content["parts"] = backbone.given
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


def read_scorer(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any], References | None]:
    """Options, name of the backbone, parts given in place of its own, and reference images.

    Raises:
        BackboneError: The files are not those that `write_scorer` wrote.
        ConfigError: A part was given as an object, which cannot be found again.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        backbone = values.pop("backbone")
        parts = dict(values.pop("parts", {}))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BackboneError(
            f"{path} is not a config that CrossAttnScorer.save_pretrained wrote: {error!r}"
        ) from error
    return values, backbone, merge_parts(parts, {}, folder), _read_references(folder)


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
