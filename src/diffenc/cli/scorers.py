"""What the commands that load a scorer share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffenc.cli.fields import Changes
from diffenc.cli.options import quiet_libraries, to_device, to_dtype
from diffenc.scoring.config import ScorerConfig

if TYPE_CHECKING:
    from diffenc.scorer import CrossAttnScorer

Texts = Annotated[
    list[str],
    typer.Option(
        "--text", "-t", metavar="TEXT", help="Text that is scored; repeat it for several."
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Kind of score: calibrated, paper, discffusion, diffusion-classifier, diffusion-itm, "
        "self-bench or denoising-gap.",
    ),
]
References = Annotated[
    list[Path] | None,
    typer.Option(
        "--reference", metavar="IMAGE", help="Your own reference image, repeated; any will do."
    ),
]

_METAVARS = {"timesteps": "T,T", "layers": "NAME,NAME", "size": "PIXELS|HxW"}


def scorer_changes(*names: str) -> Changes:
    """Options that are fields of `ScorerConfig`."""
    return Changes(ScorerConfig, names, _METAVARS)


def load_scorer(
    model: str,
    changes: Mapping[str, Any],
    *,
    device: str,
    dtype: str,
    preset: str,
    variant: str | None = None,
    references: Sequence[Path] | None = None,
) -> "CrossAttnScorer":
    """A scorer as the command line describes it.

    Args:
        model: Alias, Hub id, diffusers folder or checkpoint.
        changes: Fields of `ScorerConfig` that replace those of the preset.
        device: Name of the device.
        dtype: Name of the floating point type of the weights.
        preset: Name of the kind of score.
        variant: Word in the names of the weight files; None takes what fits the dtype.
        references: Reference images to calibrate by; None takes those of the preset.

    Raises:
        DiffencError: An option is not allowed, or the model cannot be loaded.
    """
    quiet_libraries()
    from diffenc.scorer import CrossAttnScorer

    files: dict[str, Any] = {} if variant is None else {"variant": variant}
    scorer = CrossAttnScorer.from_pretrained(
        model, device=to_device(device), dtype=to_dtype(dtype), preset=preset, **files, **changes
    )
    if references:
        scorer.calibrate(list(references))
    return scorer
