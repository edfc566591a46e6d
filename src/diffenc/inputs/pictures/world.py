"""Whether a picture can be of the miniature world, the only one that the bundled models know."""

import warnings

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diffenc.inputs.pictures.values import outside

_COLORS = 4
"""Most colours that a scene has: those of its background and of three objects."""

_LEAST = 0.8
"""Least share of a scene's pixels that have one of them; the others lie on edges."""

_LEVELS = 8

_warned = False


def is_flat(picture: Float[Tensor, "3 h w"]) -> bool:
    """Whether few colours cover most of a picture, as they do in drawings of coloured shapes.

    Args:
        picture: RGB values in [-1, 1].
    """
    levels = ((picture + 1) * (_LEVELS / 2)).floor().clamp(0, _LEVELS - 1).long()
    red, green, blue = rearrange(levels, "c h w -> c (h w)")
    counts = torch.bincount((red * _LEVELS + green) * _LEVELS + blue, minlength=_LEVELS**3)
    return int(counts.topk(_COLORS).values.sum()) >= _LEAST * len(red)


def warn_of_other_world(pixel_values: Float[Tensor, "b 3 h w"], *, model: str) -> None:
    """Warn, once in a process, of a picture that a bundled model can say nothing of.

    The first picture of a batch is looked at, which takes less than a millisecond.
    """
    global _warned  # noqa: PLW0603  # once in a process is what is wanted
    if _warned or is_flat(pixel_values[0].detach().float().cpu()):
        return
    _warned = True
    warnings.warn(
        f"the bundled model {model!r} knows coloured shapes on a plain background alone, and this "
        "picture looks like something else: its features and scores say nothing of it. For "
        "photographs load another model, such as 'sd2.1-base'",
        stacklevel=outside(),
    )
