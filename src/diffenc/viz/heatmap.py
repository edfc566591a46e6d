"""One number per cell as a colour, alone or over the picture it belongs to."""

import io
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

from diffenc.checks.arguments import number
from diffenc.errors import ConfigError
from diffenc.inputs.images import Images, to_picture
from diffenc.viz.arrays import Resample, as_picture, pil_filter, pil_size, to_array

# From dark blue over magenta to pale yellow: lightness (CIE L*) rises evenly from 5 to 90, so that
# the map reads in grey and with any colour vision.
_POSITIONS = (0.0, 0.18, 0.37, 0.56, 0.77, 1.0)
_COLORS = (
    (12, 12, 44),
    (70, 22, 110),
    (150, 38, 110),
    (216, 80, 62),
    (246, 150, 50),
    (250, 226, 140),
)


def colorize(unit: Float64[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Colours of values in [0, 1]."""
    channels = [np.interp(unit, _POSITIONS, channel) for channel in zip(*_COLORS, strict=True)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


_NOTEBOOK_SIDE = 256


class HeatMap:
    """A map of numbers, such as `CrossAttnScorer.word_maps` gives; notebooks show it as a picture.

    Args:
        values: Numbers of the map (h w), as a tensor or an array.
        low: Value of the darkest colour; None is the smallest of `values`.
        high: Value of the lightest colour; None is the largest of `values`.
        label: Name of what the map shows, such as a word; None gives none.
        picture: Picture that the map lies over in a notebook and if `overlay` is True, of any kind
            that an encoder takes; None for no picture.

    Attributes:
        low: Value of the darkest colour.
        high: Value of the lightest colour.
        label: Name of what the map shows; None if it was not given.
        picture: Picture under the map, upright and in RGB; None if it was not given.

    Raises:
        ShapeError: Not (h w), or several pictures.
        NonFiniteError: NaN or infinity.
        ConfigError: `low` above `high`, or one that is no number.
        ImageError: The picture cannot be read.
    """

    def __init__(
        self,
        values: Any,
        *,
        low: float | None = None,
        high: float | None = None,
        label: str | None = None,
        picture: "Images | None" = None,
    ) -> None:
        self._values = to_array(values, "h w")
        self.low = float(self._values.min()) if low is None else number("low", low)
        self.high = float(self._values.max()) if high is None else number("high", high)
        if not self.low <= self.high:
            raise ConfigError(f"low must not be above high, got {self.low} and {self.high}")
        self.label = label
        self.picture = None if picture is None else as_picture(picture)

    @property
    def array(self) -> Float64[np.ndarray, "h w"]:
        """The values, as a copy."""
        values: np.ndarray = self._values.copy()
        return values

    def __repr__(self) -> str:
        height, width = self._values.shape
        label = "" if self.label is None else f"{self.label!r}, "
        return f"HeatMap({label}{height} x {width} cells, {self.low:.3g} to {self.high:.3g})"

    def _repr_png_(self) -> bytes:
        """Picture for notebooks: the map over its picture, the longer side 256 pixels."""
        width, height = self.picture.size if self.picture else self._values.shape[::-1]
        factor = _NOTEBOOK_SIDE / max(height, width)
        size = (max(1, round(height * factor)), max(1, round(width * factor)))
        buffer = io.BytesIO()
        self.to_pil(size, overlay=self.picture).save(buffer, format="png")
        return buffer.getvalue()

    def to_pil(
        self,
        size: int | tuple[int, int] | None = None,
        *,
        overlay: "Images | bool | None" = None,
        alpha: float = 0.7,
        resample: Resample = "bicubic",
    ) -> Image.Image:
        """Draw the map.

        Args:
            size: Size of the picture in pixels, as one side or (height, width); None is the size of
                `overlay`, or one pixel per cell.
            overlay: Picture under the colours, of any kind that an encoder takes, shown in grey so
                that it does not tint them, and resized to the same size; True takes `picture`.
            alpha: Weight of the colours over the overlay, 0 to 1.
            resample: Way of resizing: "bicubic" smooths the values, "nearest" shows the cells.

        Raises:
            ConfigError: `alpha` or `size` is out of range, or there is no picture to take.
            ImageError: The overlay cannot be read.
            ShapeError: Several pictures.
        """
        if overlay is True and self.picture is None:
            raise ConfigError("overlay=True needs a map with a picture; pass the picture itself")
        source = self.picture if overlay is True else None if overlay is False else overlay
        under = None if source is None else to_picture(source)
        if not 0 <= number("alpha", alpha) <= 1:
            raise ConfigError(f"alpha must be in [0, 1], got {alpha}")
        if size is None:
            width, height = under.size if under is not None else self._values.shape[::-1]
        else:
            width, height = pil_size(size)
        span = self.high - self.low
        unit = (self._values - self.low) / span if span > 0 else np.zeros_like(self._values)
        # Pillow resizes float32, which has no room for small differences between large values.
        cells = Image.fromarray(unit.astype(np.float32))
        resized = np.asarray(cells.resize((width, height), pil_filter(resample)), dtype=np.float64)
        colors = Image.fromarray(colorize(np.clip(resized, 0, 1)))
        if under is None:
            return colors
        grey = under.convert("L").resize((width, height), Image.Resampling.BICUBIC)
        return Image.blend(grey.convert("RGB"), colors, alpha)

    def legend(self, size: tuple[int, int]) -> Image.Image:
        """The colours from `low` on the left to `high` on the right, as (height, width)."""
        width, height = pil_size(size)
        ramp = np.broadcast_to(np.linspace(0, 1, width), (height, width))
        return Image.fromarray(colorize(ramp))
