"""CLIP's tokens and a diffusion encoder's mixed into one stream by weights that train."""

from diffenc.mixing.base import Mixer
from diffenc.mixing.choosing import load_mixer, make_mixer
from diffenc.mixing.config import MixingConfig

__all__ = ["Mixer", "MixingConfig", "load_mixer", "make_mixer"]
