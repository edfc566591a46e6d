"""`diffenc demo`: one picture under three questions, as numbers and a figure."""

import time
from collections.abc import Iterator, Sequence
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

    from diffenc.cli.demo_answers import Query
    from diffenc.encoder import DiffusionEncoder
    from diffenc.features import Features
    from diffenc.passes.word_tokens import WordTokens

TEXTS = (
    "a purple star above an orange circle",
    "a red triangle and a yellow square",
    "a red star above a purple circle",
)
"""What is said of the picture; the last one is wrong."""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def demo(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File of the figure, such as a .png file."
        ),
    ] = Path("diffenc-demo.png"),
    model: Model = "shapes-many",
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """Ask three questions of one picture, and draw what each lights up.

    Prints the model's parts, the shapes of its features, what the words of the questions say, how
    well each text fits the picture, and timings; writes a figure. The bundled models need no
    network and no GPU.
    """
    check_output(output, suffixes=_SUFFIXES, force=force)
    quiet_libraries()
    from diffenc.cli.demo_answers import SCENES, named
    from diffenc.cli.demo_figure import draw_demo
    from diffenc.encoder import DiffusionEncoder
    from diffenc.models.shapes import BUNDLED_MODELS
    from diffenc.scorer import SCORE_TIMESTEPS
    from diffenc.shapes.example import crowded_picture

    clock = Clock()
    with clock("load the model"):
        encoder = DiffusionEncoder.from_pretrained(
            model, device=to_device(device), dtype=to_dtype(dtype)
        )
    _print_parts(encoder)
    picture, queries = crowded_picture(encoder.backbone.default_size), demo_queries()
    texts = [each.text for each in queries]
    with clock(f"features and tokens under {len(texts)} questions, both halves"):
        gathered = encoder.word_tokens([picture] * len(texts), texts, conditioning="uncond")
    _print_features(gathered.features.select("uncond"))
    answers = None
    if model in BUNDLED_MODELS:  # others know nothing of the world that the answers are learnt in
        with clock(f"learn to name what a token says, {SCENES} scenes a trait"):
            answers = named(encoder, gathered, queries)
    _print_answers(gathered, queries, answers)
    with clock(f"scores of {len(TEXTS)} texts at {len(SCORE_TIMESTEPS)} timesteps"):
        scores = _scores(encoder, picture)
    _print_scores(scores)
    with clock("draw the figure"):
        drawn = draw_demo(picture, gathered, queries, answers, model=encoder.backbone.name)
        write_whole(output, drawn.save)
    print_table("timings", ("step", "seconds"), clock.rows(), right=("seconds",))
    if model in BUNDLED_MODELS:
        typer.echo(
            "The bundled model knows coloured shapes only. For photographs: --model sd2.1-base"
        )
    typer.echo(f"wrote {output}")


def demo_queries() -> "tuple[Query, ...]":
    """The questions, each about the one object of a colour."""
    from diffenc.cli.demo_answers import query
    from diffenc.shapes.example import CROWD

    triangle, star, circle = (CROWD.objects[index] for index in (6, 1, 3))
    return query(triangle, "shape"), query(star, "shape"), query(circle, "shape")


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


def _scores(encoder: "DiffusionEncoder", picture: "Image.Image") -> dict[str, float]:
    """Score of each text."""
    import torch

    from diffenc.inputs.images import to_pixel_values
    from diffenc.inputs.latents import encode_latents
    from diffenc.scorer import denoising_scores

    backbone = encoder.backbone
    with torch.no_grad():
        pixel_values = to_pixel_values(
            picture, size=backbone.default_size, multiple=backbone.multiple
        )
        latents = encode_latents(backbone.vae, pixel_values)
    (row,) = denoising_scores(backbone, latents, TEXTS).tolist()
    return dict(zip(TEXTS, row, strict=True))


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


def _print_answers(
    gathered: "WordTokens", queries: "Sequence[Query]", answers: "Sequence[str] | None"
) -> None:
    from diffenc.cli.demo_answers import token_of

    rows = []
    for row, each in enumerate(queries):
        down, across = gathered.places[row, token_of(gathered, row, each.word), :2].tolist()
        says = "not asked" if answers is None else answers[row]
        rows.append((each.text, each.word, f"{across:.2f}, {down:.2f}", says, each.answer))
    columns = ("question", "word", "seen at x, y", "its token says", "true")
    print_table("a token of the question", columns, rows)


def _print_scores(scores: dict[str, float]) -> None:
    best = max(scores.values())
    rows = [
        (text, f"{score:.5f}", f"{score - best:.5f}")
        for text, score in sorted(scores.items(), key=lambda item: -item[1])
    ]
    columns = ("text", "score", "to the best")
    print_table("image-text scores, higher is better", columns, rows, right=columns[1:])
