"""The folder that an encoder is saved to.

    config.json       what is read, where the backbone comes from, and what else lies here
    lora/<name>/      an adapter each, in peft's layout and keyed for diffusers
    captioner/        the implicit captioner, and the name of its CLIP
    backbone/         a diffusers folder, where it was asked for

`config.json` is removed first and written last: a folder with one is whole.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diffenc.config import EncoderConfig
from diffenc.errors import BackboneError, ConfigError
from diffenc.memory.digests import is_alike
from diffenc.models.base import Backbone
from diffenc.models.sources import SOURCES
from diffenc.storage.folder_kinds import kind_of_folder
from diffenc.storage.names import exists, expanded, inside, is_file, is_folder
from diffenc.storage.pretrained import read_name, stored_name
from diffenc.storage.reading import read_json
from diffenc.storage.schema import make
from diffenc.storage.writing import begin_folder, write_json

CONFIG_FILE = "config.json"
BACKBONE_FOLDER, LORA_FOLDER, CAPTIONER_FOLDER = "backbone", "lora", "captioner"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What `config.json` says beside the encoder's config.

    Attributes:
        backbone: Name of the backbone.
        variant: Variant of the backbone's weight files that was requested.
        parts: Parts that are not the named model's own: their paths, and None for objects.
        included: Whether the backbone's weights lie in the folder.
        truncated: Whether the backbone's weights end after the last tap.
        lora: Names of the adapters that lie in the folder.
        active_lora: Name of the adapter in use; None where none is.
        merged: Whether the adapter in use is merged into the weights.
        captioner: Whether a captioner lies in the folder.
        mark: Numbers of each part of the backbone, by which it is known again.
    """

    backbone: str
    variant: str | None = None
    parts: Mapping[str, str | None] = field(default_factory=dict)
    included: bool = False
    truncated: bool = False
    lora: Sequence[str] = ()
    active_lora: str | None = None
    merged: bool = False
    captioner: bool = False
    mark: Mapping[str, list[float]] = field(default_factory=dict)


def is_saved(name: "str | os.PathLike[str]") -> bool:
    """Whether a folder of that name holds a config.

    Raises:
        BackboneError: It was being written when that was interrupted.
    """
    if isinstance(name, str) and name in SOURCES:  # no folder, whatever lies beside
        return False
    folder = expanded(name)
    if is_file(folder / CONFIG_FILE):
        return True
    if is_folder(folder) and not exists(folder / "model_index.json"):
        own = (BACKBONE_FOLDER, LORA_FOLDER, CAPTIONER_FOLDER, f"{BACKBONE_FOLDER}.partial")
        left = [part for part in own if is_folder(folder / part)]
        if left and not kind_of_folder(folder):  # that of a language model has adapters too
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
    begin_folder(folder, CONFIG_FILE)


def write_config(folder: Path, config: EncoderConfig, contents: Contents) -> None:
    """Write `config.json`; it is there whole or not at all.

    Raises:
        OutputError: The folder cannot be written.
    """
    content = asdict(contents)
    content["backbone"] = stored_name(contents.backbone, folder)
    content["parts"] = stored_parts(contents.parts, folder)
    plain = {
        "backbone": content.pop("backbone"),
        **{k: v for k, v in content.items() if v or v == ""},
    }
    write_json(folder / CONFIG_FILE, {**plain, **config.to_dict()})


def read_config(folder: Path) -> tuple[EncoderConfig, Contents]:
    """What `write_config` wrote.

    Raises:
        BackboneError: The file is not one that it wrote, or something that it names is missing.
    """
    path = folder / CONFIG_FILE
    known = Contents.__dataclass_fields__
    try:
        values = read_json(path)
        content = {key: values.pop(key) for key in list(values) if key in known}
        contents: Contents = make(Contents, content)
        named = [f"{LORA_FOLDER}/{name}" for name in contents.lora]
        for name in named:
            inside(folder, name)
    except ConfigError as error:
        raise BackboneError(
            f"{path} is not a config that DiffusionEncoder.save_pretrained wrote: {error}"
        ) from error
    named += [BACKBONE_FOLDER] * contents.included + [CAPTIONER_FOLDER] * contents.captioner
    if missing := [name for name in named if not is_folder(folder / name)]:
        raise BackboneError(f"{folder} is incomplete: it lacks {', '.join(missing)}")
    contents = replace(
        contents,
        backbone=contents.backbone if contents.included else read_source(contents.backbone, folder),
        parts=read_parts(contents.parts, folder),
    )
    return EncoderConfig.from_dict(values), contents


def read_source(name: object, folder: Path) -> str:
    """Name of the backbone in a saved config, as `load_backbone` takes it, see `read_name`."""
    return read_name(name, folder, aliases=SOURCES)


def stored_parts(parts: Mapping[str, str | None], folder: Path) -> dict[str, str | None]:
    """Paths of given parts as a config in a folder keeps them."""
    return {
        part: stored_name(name, folder) if name and part != "prediction_type" else name
        for part, name in parts.items()
    }


def read_parts(parts: Mapping[str, str | None], folder: Path) -> dict[str, str | None]:
    """Inverse of `stored_parts`."""
    return {
        part: read_name(name, folder, aliases=SOURCES)
        if name is not None and part != "prediction_type"
        else name
        for part, name in parts.items()
    }


def check_mark(
    backbone: Backbone, mark: Mapping[str, Any], folder: Path, *, exchanged: Collection[str] = ()
) -> None:
    """Raise a `BackboneError` unless a loaded model is the one that was saved.

    Args:
        backbone: Model that was loaded.
        mark: Numbers of the parts of the saved one.
        folder: Folder it was saved to.
        exchanged: Parts that the caller put in their place.
    """
    own = backbone.mark()
    replaced = {*exchanged}
    if {"unet", "transformer", "prediction_type", "architecture"} & replaced:
        replaced.add("scheduler")  # they say what is predicted
    others = [
        name
        for name, numbers in mark.items()
        if name in own
        and name.partition(".")[0] not in replaced
        and not is_alike(own[name], numbers)
    ]
    if others:
        weighty = [name for name in others if name in backbone.parts()]
        what = "weights" if weighty else "settings"
        listed = weighty or [name.partition(".")[0] for name in others]
        passed = f", or pass the part that shall stand in its place ({listed[0]}=...)"
        raise BackboneError(
            f"{backbone.name!r} is not the model that {folder} was saved with: its "
            f"{' and '.join(listed)} has other {what}. Put that model back"
            f"{passed if listed[0] != 'scheduler' else ''}; an encoder whose parts were changed "
            "by hand is saved with include_backbone=True"
        )


def merge_parts(
    saved: Mapping[str, str | None], replaced: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """The caller's parts, and for those left out the paths that were saved.

    Raises:
        ConfigError: A part was saved that was an object, and the caller does not give it.
    """
    merged = {**saved, **{name: part for name, part in replaced.items() if part is not None}}
    if lost := [name for name, part in merged.items() if part is None]:
        raise ConfigError(
            f"{folder} was saved with {', '.join(lost)} given as an object, which a config cannot "
            f"hold; pass {', '.join(f'{name}=' for name in lost)} again, or save it with "
            "include_backbone=True"
        )
    return merged
