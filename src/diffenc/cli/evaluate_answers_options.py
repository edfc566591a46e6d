"""Options of the commands under `diffenc evaluate` that ask a model questions."""

from pathlib import Path
from typing import Annotated

import typer

ModelFolder = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Folder that diffenc train or DiffusionVLM.save_pretrained wrote.",
    ),
]
CocoData = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        help="Folder with COCO's pictures and dataset_coco.json (Karpathy) or captions_*.json, or "
        "shapes: the miniature. Nothing is downloaded.",
    ),
]
Annotations = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The captions' file, where it lies elsewhere."),
]
Split = Annotated[
    str | None,
    typer.Option(metavar="WORD", help="Of dataset_coco.json; default test."),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="cider, bleu-4, rouge-l or spice, with commas or repeated; needs diffenc[caption]. "
        "Default none.",
    ),
]
TokenizerOption = Annotated[
    str,
    typer.Option(
        metavar="WORD", help="Of metrics: ptb (Java), as in published numbers, or simple."
    ),
]
DataSeed = Annotated[
    int | None,
    typer.Option(help="Of the scenes of --data shapes; choose settings on another one."),
]
PROMPTS = "What the encoder reads: question, empty, or another policy, see the guide to training."
Prompts = Annotated[
    str | None,
    typer.Option(metavar="POLICY", help=f"{PROMPTS} Default that of the model's training."),
]
Instruction = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help='Follows each question; "" for none. Default LLaVA\'s, which asks for the letter; '
        "with shapes none.",
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="The first N pictures, to try it out.")
]
Seed = Annotated[int, typer.Option(help="Of what the prompt policy draws.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Of an answer; default by the kind of question."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions per call of the model.")]
Name = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Of the model, in tables and files; default its folder's."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE.jsonl",
        help="Gets every answer as it comes; default the command's name and -results.jsonl. Where "
        "it holds answers of the same run, that run goes on.",
    ),
]
Anew = Annotated[
    bool, typer.Option("--force", "-f", help="Forget the answers in the file and begin anew.")
]
