"""The folder that an encoder is saved to: its config, and where its backbone comes from."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffenc.backbones.base import Backbone
from diffenc.config import EncoderConfig
from diffenc.errors import BackboneError, ConfigError, OutputError

CONFIG_FILE = "config.json"


def is_saved(name: "str | os.PathLike[str]") -> bool:
    """Whether a folder of that name holds a config."""
    return (Path(name) / CONFIG_FILE).is_file()


def write_config(folder: Path, backbone: Backbone, config: EncoderConfig) -> None:
    """Write a config and a reference to the backbone; a file is there whole or not at all.

    Raises:
        OutputError: The folder cannot be written.
    """
    content: dict[str, Any] = {"backbone": backbone.name}
    if backbone.given:
        content["parts"] = backbone.given
    content.update(config.to_dict())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{CONFIG_FILE}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / CONFIG_FILE)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error}") from error


def read_config(folder: Path) -> tuple[EncoderConfig, str, dict[str, str | None]]:
    """Config, name of the backbone, and the parts given in place of its own.

    Raises:
        BackboneError: The file is not one that `write_config` wrote.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        backbone = values.pop("backbone")
        parts = dict(values.pop("parts", {}))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BackboneError(
            f"{path} is not a config that DiffusionEncoder.save_pretrained wrote: {error!r}"
        ) from error
    return EncoderConfig.from_dict(values), backbone, parts


def merge_parts(
    saved: Mapping[str, str | None], given: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """The caller's parts, and for those left out the paths that were saved.

    Raises:
        ConfigError: A part was saved that was an object, and the caller does not give it.
    """
    merged = {**saved, **{name: part for name, part in given.items() if part is not None}}
    if lost := [name for name, part in merged.items() if part is None]:
        raise ConfigError(
            f"{folder} was saved with {', '.join(lost)} given as an object, which a config cannot "
            f"hold; pass {', '.join(f'{name}=' for name in lost)} again"
        )
    return merged
