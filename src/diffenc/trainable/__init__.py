"""What is trained inside an encoder whose backbone is frozen: LoRA, and the implicit captioner."""

from diffenc.trainable.captioner import CaptionerPart
from diffenc.trainable.lora import LoraPart
from diffenc.trainable.parts import TrainableParts

__all__ = ["CaptionerPart", "LoraPart", "TrainableParts"]
