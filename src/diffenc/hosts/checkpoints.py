"""Adapter weights in the checkpoints that hosts write, under whatever prefix they have there."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffenc.errors import BackboneError, ConfigError
from diffenc.hosts.adapter import ADAPTER_FILE, read_adapter
from diffenc.hosts.spec import TowerSpec
from diffenc.storage.names import is_file, is_folder
from diffenc.storage.tensors import read_pickled, read_tensors

_ADAPTER_KEY = re.compile(r"(?:.*\.)?vision_tower\.(?:.*\.)?adapter\.(\d+_(?:down|up))")


def adapter_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tower's adapter in a host's state dict, by the adapter's own names.

    Raises:
        ConfigError: Adapters of several towers are in it.
    """
    names: dict[str, str] = {}
    for key in state:
        if (match := _ADAPTER_KEY.fullmatch(key)) is None:
            continue
        if match[1] in names:
            raise ConfigError(
                f"a checkpoint holds adapters of several towers, as {names[match[1]]!r} and "
                f"{key!r}, so it is not known which is this tower's; write each by save_adapter "
                "into a folder of its own"
            )
        names[match[1]] = key
    return {name: state[key] for name, key in names.items()}


def find_adapter(
    source: "str | os.PathLike[str]", spec: TowerSpec
) -> tuple[Path, dict[str, Tensor]] | None:
    """Adapter weights in a file, or in the folder of a host's checkpoint.

    In a folder the side file comes first, then `non_lora_trainables.bin` and the model's own
    weights.

    Args:
        source: File, or folder of a host's checkpoint.
        spec: Spec of the tower; a side file that belongs to another spec is refused.

    Returns:
        Where they were found, and the weights by the adapter's own names; None if nowhere.

    Raises:
        BackboneError: There is no such file or folder, or a file is broken.
        ConfigError: The side file belongs to another spec, or a file holds several adapters.
    """
    path = Path(source)
    if is_file(path):
        files = [path]
    elif is_folder(path):
        names = [ADAPTER_FILE, "non_lora_trainables.bin"]
        patterns = ["*.safetensors", "pytorch_model*.bin"]
        candidates = [each for pattern in patterns for each in sorted(path.glob(pattern))]
        files = list(
            dict.fromkeys([path / name for name in names if is_file(path / name)] + candidates)
        )
    else:
        raise BackboneError(f"no such adapter file or checkpoint folder: {path}")
    state: dict[str, Tensor] = {}
    where = path
    for file in files:
        if file.name == ADAPTER_FILE:
            return file, read_adapter(file, spec)
        if part := _read(file):
            state, where = {**part, **state}, file  # a checkpoint in several files
    return (where, state) if state else None


def _read(file: Path) -> dict[str, Tensor]:
    read = read_tensors if file.suffix == ".safetensors" else read_pickled
    options: dict[str, Any] = {"error": BackboneError, "finite": True}
    return adapter_weights(read(file, only=_ADAPTER_KEY.fullmatch, **options))
