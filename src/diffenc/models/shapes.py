"""The bundled miniature models: where they lie, and what to read from them."""

from importlib.resources import files
from pathlib import Path

BUNDLED_MODELS = ("shapes", "shapes-many")
"""Their names: of the world of one to three objects, and of that of up to nine."""

SHAPES_TAPS = (
    "up_blocks.0.attentions.1",
    "up_blocks.1.attentions.1",
    "up_blocks.2.attentions.0",
)

_ASSETS = Path(str(files("diffenc.models"))) / "assets"

SHAPES_TAPS_FILE = _ASSETS / "shapes-taps.json"
"""Readable places of their U-Nets in module order, each with its channels and its reduction."""


def shapes_folder(name: str = "shapes") -> Path:
    """The diffusers folder of a bundled model; `StableDiffusionPipeline` loads it too.

    Args:
        name: One of `BUNDLED_MODELS`.
    """
    return _ASSETS / name
