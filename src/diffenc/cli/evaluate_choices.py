"""`diffenc evaluate mmvp` and `blink`: questions with options."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from diffenc.cli.evaluate_answers_command import asks_a_model
from diffenc.cli.evaluate_answers_options import DataSeed, Instruction
from diffenc.cli.evaluate_answers_run import Asked, refuse
from diffenc.cli.evaluate_options import Data
from diffenc.cli.score_options import split_names
from diffenc.errors import ConfigError

if TYPE_CHECKING:
    from diffenc.evals.choices import ChoiceBenchmark, ChoiceItem

_TOKENS = 32
_SHAPES_TOKENS = 16


@asks_a_model("mmvp")
def mmvp(
    asked: Asked,
    data: Data,
    fix_errata: Annotated[
        bool,
        typer.Option(
            "--fix-errata",
            help="Exchange the answers of questions 99 and 100 and of 279 and 280, which are the "
            "wrong way round in the original files.",
        ),
    ] = False,
    instruction: Instruction = None,
    limit: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="The first N questions, whole pairs of them."),
    ] = None,
    data_seed: DataSeed = None,
) -> None:
    """Ask MMVP's questions on pairs of near-same pictures.

    A pair counts where both answers are right. Options are read out of answers by fixed rules; no
    other model is asked.
    """
    _choices(**locals())


@asks_a_model("blink")
def blink(
    asked: Asked,
    data: Data,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Some of the tasks alone, with commas or repeated: Counting, "
            "Functional_Correspondence.",
        ),
    ] = None,
    instruction: Instruction = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N questions of each task.")
    ] = None,
    data_seed: DataSeed = None,
) -> None:
    """Ask BLINK's questions on one picture to four.

    The result is the mean of the accuracies of its tasks. Options are read out of answers by fixed
    rules; no other model is asked.
    """
    _choices(**locals())


def _choices(
    asked: Asked,
    *,
    data: str,
    instruction: str | None,
    limit: int | None,
    data_seed: int | None,
    task: list[str] | None = None,
    fix_errata: bool = False,
) -> None:
    from diffenc.evals.choices import choice_table, evaluate_choices

    command = asked.command
    model = asked.open_model(_SHAPES_TOKENS if data == "shapes" else _TOKENS)
    if data == "shapes":
        refuse("MMVP's files, not to --data shapes", fix_errata=fix_errata)
        benchmark = _shapes(command, data_seed, instruction, task)
    else:
        refuse("--data shapes", data_seed=data_seed)
        benchmark = _real(command, data, instruction, task, fix_errata)
    if limit is not None:
        benchmark = _limited(benchmark, limit)
    drawn = asked.draw_prompts(model, {item.id: (item.question, ()) for item in benchmark.items})

    def prompt_of(item: "ChoiceItem") -> str:
        return drawn[item.id]

    with asked.answers("asking") as (file, progress):
        found = evaluate_choices(
            benchmark, model, prompts=prompt_of, results=file, progress=progress, **asked.options
        )
    table = choice_table([found], paper=asked.paper)
    asked.report(
        found.to_dict(),
        [table.transposed("task") if command == "blink" else table],
        found.notes,
        count=len(found.items),
        fresh=found.fresh,
        miniature=data == "shapes",
    )


def _real(
    command: str,
    data: str,
    instruction: str | None,
    task: list[str] | None,
    fix_errata: bool,
) -> "ChoiceBenchmark":
    from diffenc.evals.choices import load_blink, load_mmvp
    from diffenc.evals.choices.base import LETTER_INSTRUCTION

    asking = LETTER_INSTRUCTION if instruction is None else instruction
    if command == "mmvp":
        return load_mmvp(data, fix_errata=fix_errata, instruction=asking)
    return load_blink(data, tasks=split_names(task), instruction=asking)


def _shapes(
    command: str, data_seed: int | None, instruction: str | None, task: list[str] | None
) -> "ChoiceBenchmark":
    from diffenc.evals.choices import shapes_blink, shapes_mmvp
    from diffenc.evals.choices.miniature import CHOICES_SEED

    seed = CHOICES_SEED if data_seed is None else data_seed
    if command == "mmvp":
        return shapes_mmvp(seed=seed, instruction=instruction or "")
    made = shapes_blink(seed=seed, instruction=instruction or "")
    names = split_names(task)
    if names is None:
        return made
    if unknown := [name for name in names if name not in made.groups]:
        raise ConfigError(f"unknown tasks {unknown}; the miniature has {list(made.groups)}")
    return replace(made, items=tuple(item for item in made.items if item.group in names))


def _limited(benchmark: "ChoiceBenchmark", limit: int) -> "ChoiceBenchmark":
    """The first questions: whole pairs of all, or as many of each task."""
    if benchmark.score == "pairs":
        chosen = benchmark.items[: limit - limit % 2]
    else:
        counts: dict[str, int] = {}
        kept = []
        for item in benchmark.items:
            counts[item.group] = counts.get(item.group, 0) + 1
            if counts[item.group] <= limit:
                kept.append(item)
        chosen = tuple(kept)
    if len(chosen) == len(benchmark.items):
        return benchmark
    note = f"{len(chosen)} of {len(benchmark.items)} questions, by --limit"
    return replace(benchmark, items=chosen, notes=(*benchmark.notes, note))
