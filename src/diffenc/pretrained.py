"""Names of models: what they lead to, how files keep them, and what is said where one is missing.

A name is an alias of this library, a folder or a file, or a Hub id, and is read in that order: an
alias wins over a folder of that name in the current directory, and `./name`, like every `Path`, is
the folder. A folder wins over a Hub id. Files keep folders as absolute paths, so that from another
directory the same model answers.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffenc.errors import BackboneError, DiffencError
from diffenc.storage.names import is_file, is_folder

BUNDLED = ("shapes-clip", "shapes-lm")
"""Miniatures that come with the library, beside the diffusion model `shapes`."""


def pretrained_source(name: "str | os.PathLike[str]") -> str:
    """What `from_pretrained` of transformers takes: a bundled miniature's folder, or the name.

    Args:
        name: A folder, a Hub id, or one of `BUNDLED`.

    Raises:
        BackboneError: This version lacks the miniature.
    """
    label = lasting_name(name)
    if label not in BUNDLED:
        return label
    folder = Path(str(files("diffenc") / "backbones" / "assets" / label))
    if not (folder / "config.json").is_file():
        raise BackboneError(f"this version of diffenc does not bundle {label!r}")
    return str(folder)


def lasting_name(name: "str | os.PathLike[str]", *, aliases: Collection[str] = BUNDLED) -> str:
    """A name that means the same in every directory: of a folder or a file its absolute path.

    Args:
        name: Alias, folder, file or Hub id; `~` is the home folder.
        aliases: Names that are no folders, whatever lies in the current directory.
    """
    label = os.fspath(name)
    if isinstance(name, str) and name in aliases:
        return label
    path = Path(label).expanduser()
    meant = not isinstance(name, str) or label.startswith((".", "/", "~", "\\"))
    return absolute(path) if meant or is_folder(path) or is_file(path) else label


def absolute(path: "str | os.PathLike[str]") -> str:
    """A path from the root on, without `~` and `..`; links stay: targets have other names."""
    return os.path.normpath(Path(path).expanduser().absolute())


def stored_name(name: str, folder: "str | os.PathLike[str]") -> str:
    """A lasting name as a file in a folder keeps it.

    What lies within the folder is told from there, as "./...": both may be moved together.
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
        if Path(path).exists() or not Path(name).exists():
            return path
    if Path(name).expanduser().exists():
        raise BackboneError(
            f"{os.fspath(folder)} was saved with the model {name!r}: a Hub id, or a path of the "
            f"directory in which it was saved. {absolute(name)} may be another model. If it "
            "is the one, write its whole path into the saved config; else start in another "
            "directory"
        )
    return name


@contextmanager
def loading(what: str, label: str, *, instead: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a `BackboneError`; errors of this library stay.

    Args:
        what: Is loaded, such as "a CLIP".
        label: The name as the user gave it.
        instead: What to pass.
    """
    try:
        yield
    except DiffencError:
        raise
    except Exception as error:  # missing, offline, broken: each in words of its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BackboneError(f"cannot load {what} from {label!r}: {lines[0]}. {instead}") from error


def load_whole(kind: Any, source: str) -> Any:
    """A model of transformers, all of whose weights are there.

    What else the file holds is passed over in silence: a vision tower is a part of its CLIP, and
    transformers would list the other one, weight by weight.

    Args:
        kind: A class of transformers.
        source: Of the model.

    Raises:
        BackboneError: Weights are missing, which transformers would draw at random.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, found = kind.from_pretrained(source, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(found["missing_keys"]):
        raise BackboneError(
            f"{source} holds no whole {kind.__name__}: it lacks {missing[0]!r}"
            + (f" and {len(missing) - 1} more of its weights" if len(missing) > 1 else "")
            + "; pass a model that has all of them"
        )
    return model
