"""diffenc: text-to-image diffusion models as task-aware vision encoders."""

from diffenc._version import __version__
from diffenc.backbones import TapInfo, list_backbones, list_taps, load_backbone
from diffenc.backbones.base import Backbone
from diffenc.config import EncoderConfig
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import DiffencError
from diffenc.features import Features

__all__ = [
    "Backbone",
    "DiffencError",
    "DiffusionEncoder",
    "EncoderConfig",
    "Features",
    "TapInfo",
    "__version__",
    "list_backbones",
    "list_taps",
    "load_backbone",
]
