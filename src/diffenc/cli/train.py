"""`diffenc train`: one run from a TOML file; `diffenc shapes-data`: data for it in miniature."""

from pathlib import Path
from typing import Annotated

import typer

from diffenc.cli.options import Debug, Device, quiet_libraries, to_device
from diffenc.cli.progress import progress_bar
from diffenc.cli.train_plan import print_plan
from diffenc.errors import ConfigError
from diffenc.storage.names import exists, printable

_EXAMPLES = 5


def train(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.toml", help="File that says what is trained, on what, and how."
        ),
    ],
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Check the data and tell steps, memory, time and disk; stop."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint, if any.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of processes that will share the work; for --plan."),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Operations per second that each process reaches, in 10^12; for --plan.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of samples to plan for without any data at hand; for --plan.",
        ),
    ] = None,
    device: Device = "auto",
    _debug: Debug = False,
) -> None:
    """Train a multimodal model: the projector (align), then the language model (instruct).

    Or teach an encoder alone where words are, from boxes or masks (ground).

    On several processes: torchrun --nproc-per-node 2 -m diffenc train CONFIG.toml
    """
    if not plan and any(option is not None for option in (processes, tflops, samples)):
        raise ConfigError("--processes, --tflops and --samples are for --plan")
    from diffenc.mllm.training.config import TrainConfig

    if not exists(config):
        raise ConfigError(
            f"there is no file {printable(config)}. `diffenc recipes --shapes` lists trainings "
            "that it writes; examples/train stands in the repository of diffenc, not in the package"
        )
    training = TrainConfig.read(config)
    quiet_libraries()
    if plan:
        from diffenc.mllm.training.plan import make_plan

        with progress_bar("looking at pictures", unit="pictures") as looking:
            planned = make_plan(
                training, processes=processes, tflops=tflops, samples=samples, looking=looking
            )
        print_plan(planned)
        return
    from diffenc.mllm.training.processes import is_first_process
    from diffenc.mllm.training.stages import train as run_stage

    # Each process of several has a device of its own, which the stage finds.
    chosen = None if device == "auto" else to_device(device)
    titles = ("looking at pictures", "training")
    with progress_bar(*titles, unit=("pictures", "steps")) as show:

        def report(done: int, total: int, loss: float | None) -> None:
            if show is not None:
                show(done, total, "training" if loss is None else f"training, loss {loss:.3f}")

        result = run_stage(training, resume=resume, device=chosen, progress=report, looking=show)
    if not is_first_process():
        return
    for checked in (result.data, result.phrases):
        if checked is not None and checked.broken:
            typer.echo(f"left out: {checked.describe()}")
    if result.skipped:
        some = "; ".join(result.skipped[:_EXAMPLES])
        more = "; ..." if len(result.skipped) > _EXAMPLES else ""
        typer.echo(f"skipped while training, {len(result.skipped)} samples: {some}{more}")
    if resume:
        typer.echo(f"went on from step {result.resumed_at}")
    if result.cache_hits + result.cache_misses:
        typer.echo(f"pictures encoded: {result.cache_misses}, found: {result.cache_hits}")
    typer.echo(f"{result.steps} steps, mean loss {result.loss:.4f}; wrote {result.model}")


def shapes_data(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder that is written; created if missing.")
    ],
    scenes: Annotated[int, typer.Option(help="Number of pictures.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
    turns: Annotated[
        int, typer.Option(help="Largest number of questions a conversation answers in words.")
    ] = 3,
    lettered: Annotated[
        int, typer.Option(help="Number of further questions, with options and a letter as answer.")
    ] = 2,
    size: Annotated[int, typer.Option(metavar="PIXELS", help="Side of the pictures.")] = 64,
    crowds: Annotated[
        bool, typer.Option("--crowds", help="Scenes of five to nine objects, for --size 96.")
    ] = False,
    _debug: Debug = False,
) -> None:
    """Write coloured shapes in LLaVA's format: align.json, instruct.json and images/.

    Texts whose words name boxes, to ground an encoder, are in phrases.jsonl.
    """
    from diffenc.mllm.training.miniature import write_miniature

    paths = write_miniature(
        folder,
        scenes=scenes,
        seed=seed,
        turns=turns,
        lettered=lettered,
        size=size,
        crowds=crowds,
    )
    typer.echo(f"wrote {', '.join(map(str, paths.values()))}")
