"""Vision tokens to the width of a language model: LLaVA's projectors, by LLaVA's names."""

from diffenc.projector.choosing import TokenEncoder, projector_for
from diffenc.projector.fused import FusedProjector
from diffenc.projector.plain import Projector

__all__ = ["FusedProjector", "Projector", "TokenEncoder", "projector_for"]
