"""Names of models: what they lead to, how files keep them, and what is said where one is missing.

A name is an alias of this library, a folder or a file, or a Hub id, and is read in that order: an
alias wins over a folder of that name in the current directory, and `./name`, like every `Path`, is
the folder. A folder wins over a Hub id. Files keep folders as absolute paths, so that from another
directory the same model answers.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from diffenc.errors import BackboneError, DiffencError, near_matches
from diffenc.runtime.defaults import torch_defaults
from diffenc.storage.hub import cached_conversion, converted_revision, hub_folder
from diffenc.storage.names import exists, expanded, is_file, is_folder
from diffenc.storage.reading import read_json
from diffenc.storage.remote_code import refuse_remote_code
from diffenc.storage.weights import TRANSFORMERS, choose_weights, list_folder, shard_names
from diffenc.storage.whole_models import load_from

BUNDLED_CLIPS = ("shapes-clip", "shapes-many-clip")
BUNDLED = (*BUNDLED_CLIPS, "shapes-lm")
"""Miniatures that come with the library, beside the diffusion models."""


def pretrained_source(name: "str | os.PathLike[str]") -> str:
    """Argument for `from_pretrained` of transformers: a bundled miniature's folder, or the name.

    Args:
        name: Path of a folder, a Hub id, or one of `BUNDLED`.

    Raises:
        BackboneError: This version lacks the miniature.
    """
    label = lasting_name(name)
    if label not in BUNDLED:
        return label
    folder = Path(str(files("diffenc") / "models" / "assets" / label))
    if not is_file(folder / "config.json"):
        raise BackboneError(f"this version of diffenc does not bundle {label!r}")
    return str(folder)


def lasting_name(name: "str | os.PathLike[str]", *, aliases: Collection[str] = BUNDLED) -> str:
    """A name that means the same in every directory: of a folder or a file its absolute path.

    Args:
        name: Alias, folder, file or Hub id; `~` is the home folder.
        aliases: Names that are never folders, whatever lies in the current directory.
    """
    label = os.fspath(name)
    if isinstance(name, str) and name in aliases:
        return label
    path = expanded(label)
    meant = not isinstance(name, str) or label.startswith((".", "/", "~", "\\"))
    return absolute(path) if meant or is_folder(path) or is_file(path) else label


def absolute(path: "str | os.PathLike[str]") -> str:
    """A path from the root on, without `~` and `..`; links stay: targets have other names."""
    return os.path.normpath(expanded(path).absolute())


def stored_name(name: str, folder: "str | os.PathLike[str]") -> str:
    """A lasting name as a file in a folder keeps it.

    A path within the folder is stored relative to it, as "./...": both may be moved together.
    """
    root = absolute(folder)
    if not Path(name).is_absolute() or not Path(name).is_relative_to(root):
        return name
    return f"./{Path(name).relative_to(root).as_posix()}"


def read_name(
    name: Any, folder: "str | os.PathLike[str]", *, aliases: Collection[str] = BUNDLED
) -> str:
    """The lasting name that `stored_name` wrote.

    Raises:
        BackboneError: It is no name, or one that leads to a folder here and was no folder where it
            was written, or that of another directory.
    """
    if not isinstance(name, str) or not name:
        raise BackboneError(f"{os.fspath(folder)} names no model but {name!r}")
    if name in aliases or Path(name).is_absolute():
        return name
    if name.startswith("./"):
        path = absolute(Path(folder) / name)
        if exists(path) or not exists(name):
            return path
    if exists(expanded(name)):
        raise BackboneError(
            f"{os.fspath(folder)} was saved with the model {name!r}: a Hub id, or a path of the "
            f"directory in which it was saved. {absolute(name)} may be another model. If it "
            "is the one, write its whole path into the saved config; else start in another "
            "directory"
        )
    return name


_SMALL = re.compile(r"[^/]+\.(json|txt|model|jinja)|additional_chat_templates/[^/]+\.jinja")
_DEEPEST, _LARGEST = 1024, 2**40


def model_folder(
    name: "str | os.PathLike[str]", *, weights: bool = True, half: bool = False
) -> Path:
    """The local folder of a model of transformers, fetched from the Hub where needed.

    Args:
        name: Path of a folder, a Hub id, or one of `BUNDLED`.
        weights: Whether the weights are needed; otherwise the small files alone.
        half: Whether weights in half precision are enough.

    Raises:
        BackboneError: It is no folder of one model, asks for code to be run, or has no weights
            that diffenc reads.
        Exception: The Hub's own, where it has no such model.
    """
    source = pretrained_source(name)
    folder = Path(source) if is_folder(source) else _fetched(source, weights, half)
    try:
        config = read_json(folder / "config.json", error=BackboneError, finite=False)
    except BackboneError as error:  # `loading` adds what to pass instead
        raise OSError(str(error)) from error
    refuse_remote_code(folder)
    if is_file(folder / "adapter_config.json"):
        raise BackboneError(
            f"{folder} holds an adapter (adapter_config.json), which would not be applied; merge "
            "it into its model, or pass the model"
        )
    _check_sizes(config, folder)
    return folder


def _fetched(hub_id: str, weights: bool, half: bool) -> Path:
    """Fetch a model, or where it has pickled weights alone what the Hub made of them."""

    def needed(folder: Path, listing: Sequence[str]) -> Sequence[str]:
        names = [name for name in listing if "/" not in name]
        chosen, _ = choose_weights(names, TRANSFORMERS, half=half, where=hub_id)
        if chosen.endswith(".json"):
            return sorted(set(shard_names(folder / chosen).values()))
        return [chosen]

    def fetch(revision: str | None) -> Path:
        small = _SMALL.fullmatch
        return hub_folder(
            hub_id, lambda name: bool(small(name)), needed if weights else None, revision=revision
        )

    try:
        folder = fetch(None)
        if weights:  # without network, the cache may hold the small files alone
            needed(folder, list_folder(folder))
    except BackboneError:
        if converted := cached_conversion(hub_id, "model.safetensors*"):
            return converted
        revision = converted_revision(hub_id)
        if revision is None:
            raise
        return fetch(revision)
    return folder


def _check_sizes(config: Any, folder: Path) -> None:
    """Raise for sizes with which no model can be built in a lifetime."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, folder)
        elif isinstance(value, int) and abs(value) > (_DEEPEST if "layers" in key else _LARGEST):
            raise BackboneError(f"{folder} cannot be read: its config says {key}={value}")


def model_kind(name: "str | os.PathLike[str]") -> str:
    """Kind of a model of transformers, as its config says it; some versions know other kinds.

    Raises:
        BackboneError: See `model_folder`.
        Exception: The config says no kind; or the libraries' own, where there is no such model.
    """
    folder = model_folder(name, weights=False)
    kind = read_json(folder / "config.json", finite=False).get("model_type")
    if not isinstance(kind, str):  # `loading` adds what to pass instead
        raise ValueError(f"the config in {folder} has no model_type")
    return kind


def model_config(name: "str | os.PathLike[str]") -> Any:
    """The config of a model of transformers, without its weights.

    Raises:
        BackboneError: See `model_folder`.
        Exception: The libraries' own, where there is none.
    """
    from transformers import AutoConfig

    folder = model_folder(name, weights=False)
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_image_processor(name: "str | os.PathLike[str]") -> Any:
    """The image processor of a model of transformers.

    Raises:
        BackboneError: See `model_folder`.
        Exception: The libraries' own, where there is none.
    """
    from transformers import AutoImageProcessor

    folder = model_folder(name, weights=False)
    return AutoImageProcessor.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )


def saved_image_processor(folder: Path) -> Any:
    """An image processor that lies alone in a folder, or None where there is no such folder.

    Raises:
        BackboneError: The folder holds something else.
    """
    from transformers import AutoImageProcessor

    if not is_folder(folder):
        return None
    with loading("an image processor", str(folder), instead="Save the model that had it again"):
        refuse_remote_code(folder)
        return AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )


@contextmanager
def loading(what: str, label: str, *, instead: str) -> Iterator[None]:
    """Turn all errors of the block into a `BackboneError`, except those of this library.

    Args:
        what: Description of what is loaded, such as "a CLIP".
        label: Name as the user gave it.
        instead: Advice on what to pass, a sentence that ends the message.
    """
    try:
        with torch_defaults():
            yield
    except DiffencError:
        raise
    except Exception as error:  # missing, offline, broken: each in words of its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        hint = "" if "/" in label else near_matches(label, BUNDLED, limit=1)
        raise BackboneError(
            f"cannot load {what} from {label!r}: {lines[0].rstrip('.')}.{hint} {instead}"
        ) from error


def load_whole(
    kind: Any,
    name: "str | os.PathLike[str]",
    *,
    dtype: torch.dtype = torch.float32,
    unread: Sequence[str] = (),
) -> Any:
    """Load a model of transformers and check that all of its weights are there.

    Args:
        kind: Class of transformers to load, or one of its `Auto` classes.
        name: Path of a folder, a Hub id, or one of `BUNDLED`.
        dtype: Floating point type of the weights.
        unread: Beginnings of the names of weights that are not used and may be missing.

    Raises:
        BackboneError: Weights are missing, which transformers would draw at random, or do not fit.
        Exception: The libraries' own, where there is no such model.
    """
    folder = model_folder(name, half=dtype == torch.float16)
    model = load_from(kind, folder, dtype=dtype, unread=unread)
    if not is_folder(name):  # a name by which it is found again, and no folder of the cache
        model.name_or_path = model.config._name_or_path = pretrained_source(name)
    return model
