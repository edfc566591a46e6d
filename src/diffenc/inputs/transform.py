"""A picture's way to pixel values as one object, for a `Dataset` or a `DataLoader`."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffenc._typing import Resize
from diffenc.errors import ShapeError
from diffenc.inputs.images import ImageSource, to_pixel_values


@dataclass(frozen=True, slots=True)
class Transform:
    """Read, orient, convert and resize one picture, without torchvision; workers can pickle it.

    An encoder gives the same features for its result as for the picture.

    Attributes:
        size: Size of the result in pixels, as one side or (height, width).
        resize: Way in which a picture is brought to `size`, see `EncoderConfig.resize`.
        multiple: Number of pixels that both sides of the result are multiples of.

    Examples:
        >>> from diffenc.inputs.transform import Transform
        >>> Transform(64)(picture).shape
        torch.Size([3, 64, 64])
    """

    size: int | tuple[int, int]
    resize: Resize = "squash"
    multiple: int = 8

    def __call__(self, picture: ImageSource) -> Float[Tensor, "3 height width"]:
        """Pixel values of a picture: RGB, float32, in [-1, 1].

        Args:
            picture: One picture of any kind, see `diffenc.inputs.images.to_pixel_values`.

        Raises:
            ImageError: The picture cannot be read.
            ShapeError: More than one picture.
        """
        pixel_values = to_pixel_values(
            picture, size=self.size, resize=self.resize, multiple=self.multiple
        )
        if len(pixel_values) != 1:
            raise ShapeError(f"a transform takes one picture, got {len(pixel_values)}")
        return pixel_values[0]
