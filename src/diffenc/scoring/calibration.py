"""Reference pictures: what a text scores on them is its own offset, not a match."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from diffenc.errors import ConfigError, ShapeError
from diffenc.inputs.images import Images, to_pixel_values
from diffenc.memory.cache import content_key
from diffenc.scoring.config import ScorerConfig


class References:
    """Pictures given by the user, in bytes, so that what is saved is what was used.

    Attributes:
        pictures: Pictures in RGB, 0 to 255.

    Raises:
        ShapeError: There are none, or they are no such pictures.
    """

    pictures: UInt8[Tensor, "r 3 height width"]

    def __init__(self, pictures: Tensor) -> None:
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ShapeError(
                "reference pictures must be (pictures, 3, height, width) of uint8, got "
                f"{tuple(pictures.shape)} of {pictures.dtype}"
            )
        if 0 in pictures.shape:
            raise ShapeError(
                f"there must be one reference picture or more, got {tuple(pictures.shape)}"
            )
        self.pictures = pictures

    @classmethod
    def read(
        cls, images: Images, config: ScorerConfig, *, default_size: int, multiple: int
    ) -> "References":
        """Read and resize pictures as the scorer reads those that it scores.

        Raises:
            ImageError: A picture cannot be read.
            ShapeError: No picture, or a size that the model does not take.
        """
        pixel_values = to_pixel_values(
            images, size=config.size or default_size, resize=config.resize, multiple=multiple
        )
        return cls(((pixel_values.cpu() + 1) * 127.5).round().to(torch.uint8))

    @property
    def digest(self) -> str:
        """Their number and a digest of their pixels, such as ``"12-5f0c..."``."""
        return f"{len(self.pictures)}-{content_key(self.pictures).hex()}"

    def pixel_values(self, size: tuple[int, int]) -> Float[Tensor, "r 3 height width"]:
        """Pictures in [-1, 1], squashed to (height, width) where they have another size."""
        values = self.pictures.float() / 127.5 - 1
        if tuple(values.shape[2:]) == size:
            return values
        return F.interpolate(values, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def reference_pixels(
    config: ScorerConfig, size: tuple[int, int], pictures: References | None
) -> Float[Tensor, "r 3 height width"]:
    """Reference pictures of a config, none where it has no calibration.

    Args:
        config: Config of the scorer.
        size: Size of the pictures in pixels, (height, width).
        pictures: Reference pictures that the user gave to the scorer, or None.

    Raises:
        ConfigError: The config wants the user's, and there are none or others.
    """
    if config.calibration is None:
        return torch.zeros(0, 3, *size, dtype=torch.float32, device="cpu")
    if config.calibration == "gray":
        return torch.zeros(1, 3, *size, dtype=torch.float32, device="cpu")
    if config.calibration == "neutral":
        return neutral_pictures(size)
    if pictures is None or pictures.digest != config.reference_digest:
        have = "none" if pictures is None else f"others ({pictures.digest})"
        raise ConfigError(
            f"calibration 'given' needs the reference images {config.reference_digest}, and there "
            f"are {have}: call scorer.calibrate(images), or use calibration='gray'"
        )
    return pictures.pixel_values(size)


def neutral_pictures(size: tuple[int, int]) -> Float[Tensor, "8 3 height width"]:
    """Eight pictures that show nothing: three greys, two ramps, three soft clouds of colour.

    Equal on every machine; nothing is read from disk.
    """
    height, width = size
    place: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    plain = [torch.full((3, height, width), level, **place) for level in (-0.6, 0.0, 0.6)]
    down = torch.linspace(-0.8, 0.8, height, **place)[:, None].expand(3, height, width)
    across = torch.linspace(-0.8, 0.8, width, **place).expand(3, height, width)
    generator = torch.Generator("cpu").manual_seed(0)
    coarse = torch.rand(3, 3, 4, 4, generator=generator, **place) * 2 - 1
    clouds = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    return torch.stack([*plain, down, across, *clouds.clamp(-1, 1)])
