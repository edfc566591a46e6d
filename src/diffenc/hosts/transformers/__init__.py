"""Towers for models of transformers. Importing this package registers them.

`AutoConfig`, `AutoModel`, `AutoImageProcessor` and `AutoProcessor` then know ``"diffenc"``, so that
stock classes build and load it as any other vision model.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

import diffenc.hosts.transformers._oldest  # noqa: F401  # before the classes it is needed for
from diffenc.hosts.transformers.configuration import DiffEncConfig
from diffenc.hosts.transformers.image_processing import DiffEncImageProcessor
from diffenc.hosts.transformers.llava import (
    DiffEncLlavaForConditionalGeneration,
    DiffEncLlavaNextForConditionalGeneration,
)
from diffenc.hosts.transformers.modeling import DiffEncModel
from diffenc.hosts.transformers.processing import (
    DiffEncLlavaNextProcessor,
    DiffEncLlavaProcessor,
)
from diffenc.hosts.transformers.towers import require_tower

__all__ = [
    "DiffEncConfig",
    "DiffEncImageProcessor",
    "DiffEncLlavaForConditionalGeneration",
    "DiffEncLlavaNextForConditionalGeneration",
    "DiffEncLlavaNextProcessor",
    "DiffEncLlavaProcessor",
    "DiffEncModel",
    "require_tower",
]


class _NextConfig(DiffEncConfig):
    """Never used: auto classes find a processor by its name among those of known configs."""

    model_type = "diffenc_next"


def _register() -> None:
    AutoConfig.register(DiffEncConfig.model_type, DiffEncConfig, exist_ok=True)
    AutoModel.register(DiffEncConfig, DiffEncModel, exist_ok=True)
    AutoProcessor.register(DiffEncConfig, DiffEncLlavaProcessor, exist_ok=True)
    AutoProcessor.register(_NextConfig, DiffEncLlavaNextProcessor, exist_ok=True)
    try:
        AutoImageProcessor.register(
            DiffEncConfig, image_processor_classes={"pil": DiffEncImageProcessor}, exist_ok=True
        )
    except TypeError:  # before transformers 5
        AutoImageProcessor.register(
            DiffEncConfig, slow_image_processor_class=DiffEncImageProcessor, exist_ok=True
        )


_register()
