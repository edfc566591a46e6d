"""The bundled miniature model: where it lies, and what to read from it."""

from importlib.resources import files
from pathlib import Path

SHAPES_TAPS = (
    "up_blocks.0.attentions.1",
    "up_blocks.1.attentions.1",
    "up_blocks.2.attentions.0",
)


def shapes_folder() -> Path:
    """The diffusers folder of the bundled model; `StableDiffusionPipeline` loads it too."""
    return Path(str(files("diffenc.models") / "assets" / "shapes"))
