"""The families of models: a class each, found by what an architecture is shaped like."""

from typing import Any

from diffenc.models.base import Backbone
from diffenc.models.configs import Architecture
from diffenc.models.flux import Flux
from diffenc.models.pixart import PixArt
from diffenc.models.sana import Sana
from diffenc.models.sd import StableDiffusion
from diffenc.models.sd3 import StableDiffusion3
from diffenc.models.sdxl import StableDiffusionXL

FAMILIES: dict[str, type[Backbone]] = {
    kind.family: kind
    for kind in (StableDiffusion, StableDiffusionXL, PixArt, Sana, StableDiffusion3, Flux)
}


def make_backbone(name: str, architecture: Architecture, parts: dict[str, Any]) -> Backbone:
    """A model of the family that its configs say.

    Args:
        name: Name of the backbone in messages and saved configs.
        architecture: Configs of the model.
        parts: Arguments of the family's class: components, and its own options.

    Raises:
        BackboneError: Parts do not fit each other.
    """
    return FAMILIES[architecture.family](name=name, default_taps=architecture.default_taps, **parts)
