"""Options of the commands that load a scorer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffenc.cli.encode import parse_size, parse_timestep
from diffenc.cli.fields import split_names
from diffenc.cli.options import quiet_libraries, to_device, to_dtype

if TYPE_CHECKING:
    from diffenc.scorer import CrossAttnScorer

Texts = Annotated[
    list[str], typer.Option("--text", "-t", metavar="TEXT", help="One or several: repeat it.")
]
Preset = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="calibrated, paper, discffusion, diffusion-classifier, diffusion-itm or "
        "denoising-gap.",
    ),
]
Mode = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="exact (default), or shared-query: one pass per image for any number of texts.",
    ),
]
CalibrationOption = Annotated[
    str | None, typer.Option(metavar="WORD", help="Reference images: gray, neutral or none.")
]
References = Annotated[
    list[Path] | None,
    typer.Option(
        "--reference", metavar="IMAGE", help="Your own reference image, repeated; any will do."
    ),
]
Timesteps = Annotated[
    str | None,
    typer.Option(metavar="T,T", help="Noise levels with commas; default 189,389,589,789,989."),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAMES",
        help="Cross-attentions or blocks, with commas or repeated: mid_block, up_blocks.1.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Of the noise; default 0.")]
Size = Annotated[
    str | None,
    typer.Option(metavar="PIXELS", help="Side, or HEIGHTxWIDTH; default the model's own."),
]
ResizeOption = Annotated[
    str | None, typer.Option(metavar="WORD", help="squash (default), crop, pad or none.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per call of the U-Net.")]


def load_scorer(
    model: str,
    *,
    device: str,
    dtype: str,
    preset: str,
    calibration: str | None = None,
    references: list[Path] | None = None,
    timesteps: str | None = None,
    layers: list[str] | None = None,
    size: str | None = None,
    **options: Any,  # of ScorerConfig, None: not given
) -> "CrossAttnScorer":
    """A scorer as the command line describes it.

    Raises:
        DiffencError: An option is not allowed, or the model cannot be loaded.
    """
    steps = None if timesteps is None else parse_timestep(timesteps)
    names = split_names(layers)
    options |= {
        "timesteps": (steps,) if isinstance(steps, int) else steps,
        "layers": names[0] if names in (("all",), ("discffusion",)) else names,
        "size": None if size is None else parse_size(size),
    }
    given = {name: value for name, value in options.items() if value is not None}
    if calibration is not None:
        given["calibration"] = None if calibration == "none" else calibration
    quiet_libraries()
    from diffenc.scorer import CrossAttnScorer

    scorer = CrossAttnScorer.from_pretrained(
        model, device=to_device(device), dtype=to_dtype(dtype), preset=preset, **given
    )
    if references:
        scorer.calibrate(list(references))
    return scorer
