"""Models that want code of their own to run, which diffenc never does."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffenc.errors import BackboneError, DiffencError
from diffenc.storage.names import StrPath, is_folder, printable, reason
from diffenc.storage.reading import read_text

_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")


def refuse_remote_code(folder: StrPath, *, error: type[DiffencError] = BackboneError) -> None:
    """Raise where a config in a model's folder names Python code, before anything is imported.

    Args:
        folder: Folder of a model, of a part of one, or of a tokenizer; if there is no such folder,
            nothing is raised.
        error: Class of the exception that is raised.

    Raises:
        DiffencError: `error`: a config names code, or cannot be read.
    """
    source = Path(folder)
    if not is_folder(source):
        return
    configs = sorted(
        path
        for path in source.glob("*.json")
        if path.name.endswith("config.json") or path.name == "model_index.json"
    )
    for path in configs:
        text = read_text(path, error=error)
        try:
            content = json.loads(text)  # tokenizers hold numbers that `read_json` refuses
            refuse_named_code(content, path, error=error)
        except (ValueError, RecursionError, MemoryError) as failure:
            if isinstance(failure, DiffencError):
                raise
            raise error(f"{path} is no JSON that can be read: {reason(failure)}") from failure
    if is_folder(source / "custom_generate"):
        raise error(_refusal(source / "custom_generate"))


def refuse_named_code(
    config: Any, where: StrPath, *, error: type[DiffencError] = BackboneError
) -> None:
    """Raise where a config names Python code.

    Args:
        config: Content of a JSON file.
        where: Name of the file, for messages.
        error: Class of the exception that is raised.

    Raises:
        DiffencError: `error`: it does.
    """
    for table in _tables(config):
        if key := next((key for key in _KEYS if table.get(key)), None):
            raise error(_refusal(where, f"{key}={printable(table[key], 80)}"))
        for key, value in table.items():  # of the attention, which transformers would fetch
            if key.endswith("_implementation") and "/" in str(value):
                raise error(_refusal(where, f"{key}={printable(value, 80)}"))
        if isinstance(table.get("_class_name"), list):
            raise error(_refusal(where, f"_class_name={printable(table['_class_name'], 80)}"))


def _refusal(where: StrPath, what: str = "") -> str:
    return (
        f"{where} asks for Python code of its own to be run{f' ({what})' if what else ''}, which "
        "diffenc never does. Pass a model that diffusers or transformers has a class for; where "
        "they have one for this model too, remove that entry from a copy of the file"
    )


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    """Objects of a JSON value."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _tables(entry)
