"""The bundled miniature model: where it lies, and what to read from it."""

from importlib.resources import files
from pathlib import Path

BUNDLED_MODEL = "shapes"
"""Its name."""

SHAPES_TAPS = (
    "up_blocks.0.attentions.1",
    "up_blocks.1.attentions.1",
    "up_blocks.2.attentions.0",
)

_ASSETS = Path(str(files("diffenc.models"))) / "assets"

SHAPES_TAPS_FILE = _ASSETS / "shapes-taps.json"
"""Readable places of its U-Net in module order, each with its channels and its reduction."""


def shapes_folder() -> Path:
    """The diffusers folder of the bundled model; `StableDiffusionPipeline` loads it too."""
    return _ASSETS / "shapes"
