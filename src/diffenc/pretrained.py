"""Where models of transformers are loaded from, and what is said where one cannot be."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffenc.errors import BackboneError, DiffencError

BUNDLED = ("shapes-clip", "shapes-lm")
"""Miniatures that come with the library, beside the diffusion model `shapes`."""


def pretrained_source(name: "str | os.PathLike[str]") -> str:
    """What `from_pretrained` of transformers takes: a bundled miniature's folder, or the name.

    Args:
        name: A folder, a Hub id, or one of `BUNDLED`.

    Raises:
        BackboneError: This version lacks the miniature.
    """
    label = os.fspath(name)
    if label not in BUNDLED:
        return label
    folder = Path(str(files("diffenc") / "backbones" / "assets" / label))
    if not (folder / "config.json").is_file():
        raise BackboneError(f"this version of diffenc does not bundle {label!r}")
    return str(folder)


def lasting_name(name: "str | os.PathLike[str]") -> str:
    """A name that a file can keep: of a folder its absolute path."""
    path = Path(name)
    return str(path.absolute()) if path.is_dir() else os.fspath(name)


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
