"""The folder that an encoder is saved to.

    config.json       what is read, where the backbone comes from, and what else lies here
    lora/<name>/      an adapter each, in peft's layout and keyed for diffusers
    captioner/        the implicit captioner, and the name of its CLIP
    backbone/         a diffusers folder, where it was asked for

`config.json` is removed first and written last: a folder with one is whole.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffenc.backbones.sources import SOURCES
from diffenc.config import EncoderConfig
from diffenc.errors import BackboneError, ConfigError, OutputError

CONFIG_FILE = "config.json"
BACKBONE_FOLDER, LORA_FOLDER, CAPTIONER_FOLDER = "backbone", "lora", "captioner"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What `config.json` says beside the encoder's config.

    Attributes:
        backbone: Name of the backbone.
        parts: Parts that are not the named model's own: their paths, None for objects.
        included: Whether the backbone's weights lie in the folder.
        truncated: Whether those end after the last tap.
        lora: Names of the adapters that lie in the folder.
        active_lora: The one in use.
        merged: Whether that one is merged into the weights.
        captioner: Whether a captioner lies in the folder.
    """

    backbone: str
    parts: Mapping[str, str | None] = field(default_factory=dict)
    included: bool = False
    truncated: bool = False
    lora: Sequence[str] = ()
    active_lora: str | None = None
    merged: bool = False
    captioner: bool = False


def is_saved(name: "str | os.PathLike[str]") -> bool:
    """Whether a folder of that name holds a config.

    Raises:
        BackboneError: It was being written when that was interrupted.
    """
    folder = Path(name)
    if (folder / CONFIG_FILE).is_file():
        return True
    named = os.fspath(name) in SOURCES  # an alias is no folder, whatever lies beside
    if not named and folder.is_dir() and not (folder / "model_index.json").exists():
        own = (BACKBONE_FOLDER, LORA_FOLDER, CAPTIONER_FOLDER, f"{BACKBONE_FOLDER}.partial")
        if left := [part for part in own if (folder / part).is_dir()]:
            raise BackboneError(
                f"{folder} holds {', '.join(left)} and no {CONFIG_FILE}: saving an encoder was "
                "interrupted. Save it again."
            )
    return False


def begin(folder: Path) -> None:
    """Make a folder, or mark one as incomplete.

    Raises:
        OutputError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error}") from error


def write_config(folder: Path, config: EncoderConfig, contents: Contents) -> None:
    """Write `config.json`; it is there whole or not at all.

    Raises:
        OutputError: The folder cannot be written.
    """
    told = asdict(contents)
    plain = {"backbone": told.pop("backbone"), **{k: v for k, v in told.items() if v}}
    try:
        partial = folder / f"{CONFIG_FILE}.partial"
        text = json.dumps({**plain, **config.to_dict()}, indent=2)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(folder / CONFIG_FILE)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error}") from error


def read_config(folder: Path) -> tuple[EncoderConfig, Contents]:
    """What `write_config` wrote.

    Raises:
        BackboneError: The file is not one that it wrote, or something that it names is missing.
    """
    path = folder / CONFIG_FILE
    known = Contents.__dataclass_fields__
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        told = {key: values.pop(key) for key in list(values) if key in known}
        contents = Contents(**told)
        dict(contents.parts), list(contents.lora)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BackboneError(
            f"{path} is not a config that DiffusionEncoder.save_pretrained wrote: {error!r}"
        ) from error
    named = [f"{LORA_FOLDER}/{name}" for name in contents.lora]
    named += [BACKBONE_FOLDER] * contents.included + [CAPTIONER_FOLDER] * contents.captioner
    if missing := [name for name in named if not (folder / name).is_dir()]:
        raise BackboneError(f"{folder} is incomplete: it lacks {', '.join(missing)}")
    return EncoderConfig.from_dict(values), contents


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
            f"hold; pass {', '.join(f'{name}=' for name in lost)} again, or save it with "
            "include_backbone=True"
        )
    return merged
