"""Pictures to `pixel_values`, in the forms in which hosts ask their image processor."""

from typing import Any, get_args

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from diffenc._typing import Resize
from diffenc.checks.arguments import whole
from diffenc.config import check_choice
from diffenc.errors import ConfigError
from diffenc.inputs.images import to_pixel_values

_EDGES = ("shortest_edge", "height", "width")
_HALF = [0.5, 0.5, 0.5]


class TowerImageProcessor(BaseImageProcessor):  # type: ignore[misc]  # untyped
    """RGB squares in [-1, 1] of one size.

    It stands where hosts expect CLIP's: they call it, or `preprocess`, and read `size`,
    `crop_size`, `image_mean` and `image_std`. It holds no tensors, so it may be copied and pickled.

    Args:
        size: Side in pixels, or a mapping that holds it under "shortest_edge", or "height" and
            "width".
        resize: Way in which pictures are brought to the size, see `EncoderConfig.resize`; "none" is
            not for towers.
        ignored: Further values that hosts save with an image processor; ignored.

    Raises:
        ConfigError: There is no such size.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  # transformers' own way

    def __init__(self, size: Any = 512, resize: Resize = "squash", **ignored: Any) -> None:
        super().__init__()
        known = dict(size) if hasattr(size, "get") else {"height": size}  # SizeDict is no Mapping
        sides = [known[edge] for edge in _EDGES if known.get(edge) is not None]
        if not sides or sides.count(sides[0]) < len(sides) or resize == "none":
            raise ConfigError(
                "size must be a side in pixels, alone or as shortest_edge, height and width, which "
                f"are alike in a square, and resize 'squash', 'crop' or 'pad', got {size!r} and "
                f"{resize!r}"
            )
        side = whole("size", sides[0], least=1)
        check_choice("resize", resize, get_args(Resize))
        self.size = {"shortest_edge": side, "height": side, "width": side}
        self.crop_size = {"height": side, "width": side}
        self.image_mean, self.image_std = list(_HALF), list(_HALF)
        self.resize = resize

    def __call__(self, images: Any, return_tensors: Any = None, **ignored: Any) -> BatchFeature:
        """Bring pictures to the tower's size, as `preprocess` does."""
        return self.preprocess(images, return_tensors=return_tensors)

    def preprocess(self, images: Any, return_tensors: Any = None, **ignored: Any) -> BatchFeature:
        """Bring pictures to the tower's size.

        Args:
            images: One picture or several, see `diffenc.inputs.images.to_pixel_values`; or a list
                for each sample, as chat templates hand them, which are joined.
            return_tensors: Form of the result: "pt" gives one tensor, "np" one array, None a list
                of arrays.
            ignored: Further options that hosts pass to CLIP's processor, such as `do_center_crop`;
                ignored, as the tower takes one size.

        Returns:
            Pictures (n, 3, size, size) under "pixel_values".
        """
        side = self.crop_size["height"]
        values = to_pixel_values(_joined(images), size=side, resize=self.resize, multiple=1)
        if getattr(return_tensors, "value", return_tensors) == "pt":
            return BatchFeature({"pixel_values": values})
        array: np.ndarray = values.cpu().numpy()
        as_is = getattr(return_tensors, "value", return_tensors) == "np"
        return BatchFeature({"pixel_values": array if as_is else list(array)})


def _joined(images: Any) -> Any:
    """Lists of pictures as one list; samples without a picture add none."""
    if not isinstance(images, (list, tuple)):
        return images
    nested = [each for each in images if isinstance(each, (list, tuple)) or each is None]
    if not nested or any(_is_numbers(each) for each in nested):
        return images
    parts = [_joined(each) if isinstance(each, (list, tuple)) else [each] for each in images]
    return [picture for part in parts for picture in part if picture is not None]


def _is_numbers(value: Any) -> bool:
    """Whether nested lists hold numbers: a picture written out, not several pictures."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (int, float))
