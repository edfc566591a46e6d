"""`diffenc demo`: features, scores and word maps of a bundled picture, as numbers and a figure."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffenc.cli.files import check_output, write_whole
from diffenc.cli.options import (
    Debug,
    Device,
    Dtype,
    Force,
    Model,
    quiet_libraries,
    to_device,
    to_dtype,
)
from diffenc.cli.tables import print_table, readable_bytes

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from diffenc.encoder import DiffusionEncoder
    from diffenc.features import Features

PROMPTS = (
    "a red circle left of a blue square",
    "a yellow star below a red circle",
    "a red circle, a blue square and a yellow star",
)
WRONG_PROMPT = "a green triangle above a purple star"
WORDS = ("circle", "square")
"""Words of the first prompt that attention maps are drawn for."""

GUIDANCE_SCALE = 3.0
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def demo(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File of the figure, such as a .png file."
        ),
    ] = Path("diffenc-demo.png"),
    model: Model = "shapes",
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """Draw features, scores and word maps of a bundled picture.

    Prints the model's parts, the shapes of its features, how well each prompt fits the picture, and
    timings; writes a figure. The bundled model needs no network and no GPU.
    """
    check_output(output, suffixes=_SUFFIXES, force=force)
    quiet_libraries()
    from diffenc.cli.demo_figure import draw_demo
    from diffenc.encoder import DiffusionEncoder
    from diffenc.shapes.example import example_picture

    clock = Clock()
    with clock("load the model"):
        encoder = DiffusionEncoder.from_pretrained(
            model, device=to_device(device), dtype=to_dtype(dtype)
        )
    _print_parts(encoder)
    picture = example_picture(encoder.backbone.default_size)
    with clock(f"features under {len(PROMPTS)} prompts, both halves"):
        features = encoder.extract(
            [picture] * len(PROMPTS), PROMPTS, conditioning="cfg", guidance_scale=GUIDANCE_SCALE
        )
    _print_features(features)
    scores, maps = _scores_and_maps(encoder, picture, clock)
    _print_scores(scores)
    with clock("draw the figure"):
        drawn = draw_demo(
            picture,
            features,
            dict(zip(WORDS, maps, strict=True)),
            scores,
            prompts=PROMPTS,
            timesteps=encoder.config.timesteps,
            model=encoder.backbone.name,
        )
        write_whole(output, drawn.save)
    print_table("timings", ("step", "seconds"), clock.rows(), right=("seconds",))
    if model == "shapes":
        typer.echo(
            "The bundled model knows coloured shapes only. For photographs: --model sd2.1-base"
        )
    typer.echo(f"wrote {output}")


class Clock:
    """Wall-clock seconds of named steps."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Time what runs in the block, to the end of what it started on a GPU."""
        import torch

        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._seconds[step] = time.perf_counter() - start

    def rows(self) -> list[tuple[str, str]]:
        """Steps in order, and all together."""
        steps = {**self._seconds, "all": sum(self._seconds.values())}
        return [(step, f"{seconds:.2f}") for step, seconds in steps.items()]


def _scores_and_maps(
    encoder: "DiffusionEncoder", picture: "Image.Image", clock: Clock
) -> "tuple[dict[str, float], Tensor]":
    """Score of each prompt and the wrong one, and a map (words h w) of the first prompt."""
    import torch

    from diffenc.inputs.images import to_pixel_values
    from diffenc.inputs.latents import encode_latents
    from diffenc.scorer import SCORE_TIMESTEPS, denoising_scores
    from diffenc.scoring.word_maps import WORD_LAYERS, WORD_TIMESTEPS, word_maps

    backbone, texts = encoder.backbone, [*PROMPTS, WRONG_PROMPT]
    with torch.no_grad():
        pixel_values = to_pixel_values(
            picture, size=backbone.default_size, multiple=backbone.multiple
        )
        latents = encode_latents(backbone.vae, pixel_values)
    with clock(f"scores of {len(texts)} texts at {len(SCORE_TIMESTEPS)} timesteps"):
        (row,) = denoising_scores(backbone, latents, texts).tolist()
    with clock(f"attention maps of {len(WORDS)} words at {len(WORD_TIMESTEPS)} timesteps"):
        (maps,) = word_maps(
            backbone, latents, PROMPTS[0], WORDS, timesteps=WORD_TIMESTEPS, layers=WORD_LAYERS
        )
    return dict(zip(texts, row, strict=True)), maps


def _print_parts(encoder: "DiffusionEncoder") -> None:
    rows = []
    for name, module in encoder.backbone.parts().items():
        weights = list(module.parameters())
        count, size = sum(w.numel() for w in weights), sum(w.nbytes for w in weights)
        dtype = str(weights[0].dtype).removeprefix("torch.")
        rows.append((name, type(module).__name__, f"{count:,}", dtype, readable_bytes(size)))
    columns = ("part", "class", "parameters", "dtype", "memory")
    title = f"model {encoder.backbone.name} on {encoder.device}"
    print_table(title, columns, rows, right=("parameters", "memory"))


def _print_features(features: "Features") -> None:
    rows = [(name, " x ".join(map(str, maps.shape[1:]))) for name, maps in features.items()]
    tokens = " x ".join(map(str, features.tokens().shape[1:]))
    rows.append(("all taps as tokens", tokens))
    print_table("features of an image", ("tap", "channels x height x width"), rows)


def _print_scores(scores: dict[str, float]) -> None:
    best = max(scores.values())
    rows = [
        (text, f"{score:.5f}", f"{score - best:.5f}")
        for text, score in sorted(scores.items(), key=lambda item: -item[1])
    ]
    columns = ("text", "score", "to the best")
    print_table("image-text scores, higher is better", columns, rows, right=columns[1:])
