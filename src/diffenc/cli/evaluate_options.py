"""Options of the commands under `diffenc evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        help="Folder or .zip file of the download, its Hub id if it is in the Hub's cache, or "
        "shapes: the miniature. Nothing is downloaded.",
    ),
]
BenchmarkArgument = Annotated[
    str, typer.Argument(metavar="BENCHMARK", help="winoground or mmvp-vlm.")
]
PerLabel = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Items per kind, of --data shapes; default 30 or 15."),
]
DataSeed = Annotated[
    int | None, typer.Option(help="Of the scenes of --data shapes; default 960000.")
]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help='What is scored for a caption, "{}" being it; default "{}", and for MMVP-VLM '
        '"a photo of {}", as in its own evaluation.',
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="The first N items alone, to try it out.")
]
Anew = Annotated[
    bool, typer.Option("--force", "-f", help="Forget the scores in the folder and begin anew.")
]
DataReferences = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Calibrate by N pictures of the data; with shapes, of other scenes.",
    ),
]

_SPEC = (
    "calibrated, paper, discffusion, diffusion-classifier, diffusion-itm or denoising-gap; "
    "calibrated+shared-query"
)

Presets = Annotated[
    list[str] | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help=f"Kinds of score, repeated: {_SPEC} and the like; none: CLIP alone. Default "
        "calibrated.",
    ),
]
OnePreset = Annotated[str, typer.Option("--preset", metavar="NAME", help=f"{_SPEC}.")]
Clip = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A CLIPModel on the same items, repeated: a folder, a Hub id, or shapes-clip.",
    ),
]
Trials = Annotated[int, typer.Option(min=1, help="How often, with other noise.")]
TimestepsOption = Annotated[
    str | None, typer.Option(metavar="T,T", help="Noise levels; default those of the preset.")
]
FirstSeed = Annotated[int, typer.Option("--seed", help="Of the noise of the first trial.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="Gets the scores of every item and the report; default the command's name and "
        "-results. Where it holds scores of the same run, that run goes on.",
    ),
]
Paper = Annotated[
    bool | None,
    typer.Option("--paper/--no-paper", help="The paper's rows; default with real data alone."),
]
