"""`diffenc score`: how well images and texts fit."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffenc._version import __version__
from diffenc.cli.fields import with_fields
from diffenc.cli.options import AsJson, Debug, Device, Dtype, Model, SkipBroken, Variant
from diffenc.cli.pictures import PictureFiles
from diffenc.cli.scorers import Preset, References, Texts, load_scorer, scorer_changes
from diffenc.cli.tables import print_table
from diffenc.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffenc.scoring.result import Scores


def _score(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Files of pictures.")],
    texts: Texts,
    changes: dict[str, Any],
    model: Model = "shapes",
    preset: Preset = "calibrated",
    trials: Annotated[
        int, typer.Option(min=1, help="Number of scores with other noise that are averaged.")
    ] = 1,
    screen: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Texts per image that are scored to the end; others are dropped on the way.",
        ),
    ] = None,
    references: References = None,
    as_json: AsJson = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    skip_broken: SkipBroken = False,
    variant: Variant = None,
    _debug: Debug = False,
) -> None:
    """Score every image under every text; higher is better.

    The best text of each image and the best image of each text are marked. With several trials the
    sample standard deviation stands beside the mean.
    """
    PictureFiles(references or ()).check()
    files = PictureFiles(images, skip_broken)
    files.check()  # what cannot be read is told before the model is loaded
    from diffenc.scoring.encoded_call import cuts_known

    scorer = load_scorer(
        model,
        changes,
        device=device,
        dtype=dtype,
        preset=preset,
        variant=variant,
        references=references,
    )
    with cuts_known():  # cut texts are told below
        scores = _scores(
            files, lambda paths: scorer.score(paths, texts, trials=trials, screen=screen)
        )
    images = files.kept_paths
    if as_json:
        content = _content(scores, images, scorer.backbone.name)
        typer.echo(json.dumps({**content, "left_out": files.left_out}, indent=2))
    else:
        _print(scores, images, scorer.backbone.name)
    files.report()
    if cut := sum(count > 0 for count in scores.truncated):
        typer.echo(
            f"warning: {cut} texts are longer than the text encoder reads and were cut", err=True
        )


_CHANGES = ("mode", "reuse", "calibration", "timesteps", "layers", "size", "resize", "seed")
score = with_fields(_score, {"changes": scorer_changes(*_CHANGES, "batch_size")})


def _scores(files: PictureFiles, score_files: "Callable[[list[str]], Scores]") -> "Scores":
    """Scores of the pictures that can be read, anew where one broke after it was checked."""
    while True:
        try:
            return score_files(list(map(str, files.kept_paths)))
        except ImageError:
            if not files.check():
                raise


def _content(scores: "Scores", images: list[Path], model: str) -> dict[str, object]:
    several = len(scores.seeds) > 1
    mean = [
        [None if out else value for value, out in zip(row, gone, strict=True)]
        for row, gone in zip(scores.mean.tolist(), scores.dropped.tolist(), strict=True)
    ]
    return {
        "version": __version__,
        "model": model,
        "config": scores.config.to_dict(),
        "images": [str(image) for image in images],
        "texts": list(scores.texts),
        "mean": mean,
        "std": scores.std.tolist() if several and not scores.dropped.any() else None,
        "trials": None if scores.dropped.any() else scores.trials.tolist(),
        "seeds": list(scores.seeds),
        "dropped": scores.dropped.tolist(),
        "truncated": list(scores.truncated),
        "best_text": scores.mean.argmax(dim=1).tolist(),
        "best_image": scores.best_images(),
    }


def _print(scores: "Scores", images: list[Path], model: str) -> None:
    mean, std, dropped = scores.mean, scores.std, scores.dropped
    best_text, best_image = mean.argmax(dim=1).tolist(), scores.best_images()
    names = [image.name for image in images]
    if len(set(names)) < len(names):
        names = list(map(str, images))
    rows = []
    for i, name in enumerate(names):
        for j, text in enumerate(scores.texts):
            value = "dropped" if dropped[i, j] else f"{mean[i, j]:.4f}"
            row = [name, text, value]
            if len(scores.seeds) > 1:
                row.append("" if dropped[i, j] else f"{std[i, j]:.4f}")
            if len(scores.texts) > 1:
                row.append("best" if j == best_text[i] else "")
            if len(images) > 1:
                row.append("best" if i == best_image[j] else "")
            rows.append(row)
    columns = ["image", "text", "score"]
    columns += ["deviation"] if len(scores.seeds) > 1 else []
    columns += ["of texts"] if len(scores.texts) > 1 else []
    columns += ["of images"] if len(images) > 1 else []
    title = f"scores of {model}, higher is better"
    print_table(title, columns, rows, right=("score", "deviation"))
