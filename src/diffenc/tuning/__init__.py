"""What is trained inside an encoder whose backbone is frozen: LoRA, and the implicit captioner."""

from diffenc.tuning.captioner import CaptionerPart
from diffenc.tuning.lora import LoraPart
from diffenc.tuning.parts import TrainableParts

__all__ = ["CaptionerPart", "LoraPart", "TrainableParts"]
