"""Every exception of diffenc: `DiffencError` at the root, each also a builtin; one warning."""

from collections.abc import Iterable
from difflib import get_close_matches


class DiffencError(Exception):
    """Root of all errors that diffenc raises on purpose."""


class ConfigError(DiffencError, ValueError):
    """An option has a value that is not allowed, or two options contradict each other."""


class ImageError(DiffencError, ValueError):
    """An image cannot be read, has no pixels, or holds values that no image has."""


class PromptError(DiffencError, ValueError):
    """A prompt is no text, or the number of prompts fits the number of images in no way."""


class ShapeError(DiffencError, ValueError):
    """A tensor has the wrong number of axes, channels or entries."""


class TapError(DiffencError, LookupError):
    """A U-Net has no such place to read from."""


class BackboneError(DiffencError, LookupError):
    """A backbone is unknown, missing, incomplete or broken."""


class OutputError(DiffencError, OSError):
    """A result cannot be written where it was asked for."""


class NonFiniteError(DiffencError, ArithmeticError):
    """A computation gave NaN or infinity."""


class MissingExtraError(DiffencError, ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""


class RangeWarning(UserWarning):
    """Image values look as if they were in another range than the one they are read in."""


def near_matches(name: object, known: Iterable[str], limit: int = 3) -> str:
    """A hint such as ``" Did you mean 'mid_block'?"``, or "" when nothing is near."""
    if not isinstance(name, str) or len(name) > 200:
        return ""
    matches = get_close_matches(name, list(known), n=limit, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""
