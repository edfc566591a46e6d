"""What vision models of transformers have in common here, and the pictures that they take."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diffenc.inputs.images import Images, as_list, to_image, to_picture

__all__ = ["VisionModel", "process", "to_image", "to_pictures"]


class VisionModel(nn.Module):
    """Base of what gives the tokens of a square of patches.

    Attributes:
        model: Vision model of transformers, or a `VisionModel` itself.
        image_processor: Image processor of the model.
        layer: Index of the hidden state that is read.
        name: Name or path that the model was loaded from; None for an object.
        hidden_size: Number of channels of a token.
        side: Number of patches per side of the square.
    """

    model: Any
    image_processor: Any
    layer: int
    name: str | None
    hidden_size: int
    side: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the model."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype


def to_pictures(images: Images) -> list[Image.Image]:
    """Upright RGB pictures of 8 bits at their own size, from pictures of any kind."""
    return [to_picture(source) for source in as_list(images)]


def process(image_processor: Any, pictures: Sequence[Image.Image]) -> Mapping[str, Tensor]:
    """What an image processor of transformers makes of pictures: tensors on the CPU."""
    with torch.device("cpu"):  # before transformers 5 they are made on torch's default device
        shown: Mapping[str, Tensor] = image_processor(images=list(pictures), return_tensors="pt")
    return shown
