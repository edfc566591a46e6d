"""Literal unions that appear in public signatures, and sizes whose sides have names."""

from typing import Literal, NamedTuple

Conditioning = Literal["uncond", "cond", "cfg", "concat"]
Resize = Literal["squash", "crop", "pad", "none"]
Uncond = Literal["zeros", "empty"]
Posterior = Literal["mode", "sample"]
Reused = Literal["down", "middle"]
LongPrompts = Literal["truncate", "chunk"]
Prediction = Literal["epsilon", "v_prediction", "sample"]
Placed = Literal["channel", "tokens", "interleave"]
Mixed = Literal["cross_attention", "add", "weighted", "gated", "token_gated", "question_gated"]
How = Literal[Placed, Mixed]
Tokens = Literal["grid", "words", "grid+words"]
Stream = Literal["clip", "diffusion"]


class Size(NamedTuple):
    """Height and width in pixels, by name, wherever (height, width) is taken.

    PIL, OpenCV's `resize` and most options of other programs have (width, height); names cannot be
    transposed by accident.

    Attributes:
        height: Number of rows of pixels.
        width: Number of pixels in a row.

    Examples:
        >>> from diffenc import Size
        >>> Size(width=640, height=480)
        Size(height=480, width=640)
    """

    height: int
    width: int
