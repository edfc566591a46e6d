"""`diffenc evaluate llava-bench`: open questions, and a judge of the answers."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from diffenc.cli.evaluate_answers_command import asks_a_model
from diffenc.cli.evaluate_answers_options import (
    DataSeed,
)
from diffenc.cli.evaluate_answers_run import Asked, refuse
from diffenc.cli.evaluate_options import Data
from diffenc.cli.options import to_device, to_dtype
from diffenc.errors import ConfigError

if TYPE_CHECKING:
    from diffenc.evals.llava_bench import (
        BenchItem,
        LlavaBench,
        LocalJudge,
        OpenAIJudge,
        WordJudge,
    )

_TOKENS = 512
_SHAPES_TOKENS = 32
_OPENAI = "api.openai.com"
_OPENAI_KEY = "OPENAI_API_KEY"


@asks_a_model("llava-bench")
def llava_bench(
    asked: Asked,
    data: Data,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL|FOLDER",
            help="Who compares: the address of a service of OpenAI's kind, such as "
            "https://api.openai.com/v1, with --judge-model; a folder of a language model; or "
            "words, which counts common words and is the default with shapes alone.",
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The service's name of the judge.")
    ] = None,
    judge_key: Annotated[
        str | None,
        typer.Option(
            metavar="VARIABLE",
            help=f"Environment variable with the service's key; default {_OPENAI_KEY} for "
            f"{_OPENAI}, for others none.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N questions, to try it out.")
    ] = None,
    data_seed: DataSeed = None,
) -> None:
    """Ask open questions, and let a judge compare.

    The questions are those of LLaVA-Bench in the Wild. The result is 100 x mean score of the
    answers / mean score of the references. Reviews that failed are in no number; the same command
    asks for them again.
    """
    from diffenc.evals.llava_bench import (
        OpenAIJudge,
        WordJudge,
        bench_table,
        evaluate_llava_bench,
    )

    model = asked.open_model(_SHAPES_TOKENS if data == "shapes" else _TOKENS)
    benchmark = _read(data, limit, data_seed)
    who = _judge(
        *(judge or ("words" if data == "shapes" else None), judge_model, judge_key),
        device=asked.device,
        dtype=asked.dtype,
        before_loading=model.release,
    )
    drawn = asked.draw_prompts(model, {item.id: (item.question, ()) for item in benchmark.items})
    if not isinstance(who, WordJudge):
        who.check()

    def prompt_of(item: "BenchItem") -> str:
        return drawn[item.id]

    with asked.answers("answering", "judging") as (file, progress):
        found = evaluate_llava_bench(
            benchmark,
            model,
            who,
            prompts=prompt_of,
            attempts=5 if isinstance(who, OpenAIJudge) else 1,  # others would say the same again
            results=file,
            progress=progress,
            **asked.options,
        )
    if not found.reviews:
        why = next(iter(found.failures.values()))
        raise ConfigError(
            f"{who.name} reviewed none of {len(found.items)} answers: {why}. The answers are in "
            f"{asked.file}; the same command asks for reviews again, also of another --judge"
        )
    asked.report(
        found.to_dict(),
        [bench_table([found], paper=asked.paper)],
        found.notes,
        count=len(found.items) + len(found.reviews),
        fresh=found.fresh,
        miniature=data == "shapes",
    )


def _read(data: str, limit: int | None, data_seed: int | None) -> "LlavaBench":
    from diffenc.evals.llava_bench import load_llava_bench, shapes_llava_bench
    from diffenc.evals.llava_bench.miniature import BENCH_SEED

    if data == "shapes":
        benchmark = shapes_llava_bench(seed=BENCH_SEED if data_seed is None else data_seed)
    else:
        refuse("--data shapes", data_seed=data_seed)
        benchmark = load_llava_bench(data)
    if limit is None or limit >= len(benchmark.items):
        return benchmark
    note = f"{limit} of {len(benchmark.items)} questions, by --limit"
    return replace(benchmark, items=benchmark.items[:limit], notes=(*benchmark.notes, note))


def _judge(
    judge: str | None,
    model: str | None,
    key: str | None,
    *,
    device: str,
    dtype: str,
    before_loading: Callable[[], object],
) -> "OpenAIJudge | LocalJudge | WordJudge":
    """Make the judge that the command line names.

    Raises:
        ConfigError: No judge is named, or the options do not go together.
    """
    from diffenc.evals.llava_bench import LocalJudge, OpenAIJudge, WordJudge

    if judge is None:
        raise ConfigError(
            "--judge is missing: name a service by --judge URL --judge-model NAME, the folder of "
            "a language model, or words, which only counts common words"
        )
    if not judge.startswith(("http://", "https://")):
        refuse("a --judge that is a URL", judge_model=model, judge_key=key)
        if judge == "words":
            return WordJudge()
        return LocalJudge(
            judge, device=to_device(device), dtype=to_dtype(dtype), before_loading=before_loading
        )
    if model is None:
        raise ConfigError(f"--judge {judge} needs --judge-model, the service's name of the judge")
    variable = key or (_OPENAI_KEY if urlsplit(judge).hostname == _OPENAI else None)
    if variable and not os.environ.get(variable):
        raise ConfigError(
            f"the environment variable {variable} is not set; it holds the key of {judge}, and "
            "--judge-key names another one"
        )
    return OpenAIJudge(model, judge, key_variable=variable)
