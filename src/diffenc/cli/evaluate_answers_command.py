"""Commands that ask a model questions: options of their own, then those that all of them have."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any

from diffenc.cli.evaluate_answers_options import (
    Anew,
    BatchSize,
    MaxNewTokens,
    ModelFolder,
    Name,
    Output,
    Prompts,
    Seed,
)
from diffenc.cli.evaluate_answers_run import Asked
from diffenc.cli.evaluate_options import Paper
from diffenc.cli.options import Debug, Device, Dtype, SkipBroken
from diffenc.cli.score_options import AsJson

_Command = Callable[..., None]


def _shared(
    model: ModelFolder,
    prompts: Prompts = None,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 8,
    skip_broken: SkipBroken = False,
    name: Name = None,
    output: Output = None,
    paper: Paper = None,
    as_json: AsJson = False,
    force: Anew = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    _debug: Debug = False,
) -> None:
    """Options that all of these commands share; the names are those of `Asked`."""


def asks_a_model(name: str, **changed: Any) -> Callable[[_Command], _Command]:
    """Make a command of a function whose first parameter is an `Asked`.

    Typer sees the model, the function's other parameters, and the shared options behind them.

    Args:
        name: Name of the command.
        changed: Annotations of shared options that have another meaning in this command; None
            leaves an option out.
    """
    shared = {key: each for key, each in signature(_shared).parameters.items() if key != "model"}
    for key, annotation in changed.items():
        each = shared.pop(key)
        if annotation is not None:
            shared[key] = each.replace(annotation=annotation)
    ordered = [shared[key] for key in signature(_shared).parameters if key in shared]

    def decorate(command: _Command) -> _Command:
        own = list(signature(command).parameters.values())[1:]
        model = signature(_shared).parameters["model"]

        @wraps(command)
        def run(**given: Any) -> None:
            told = {key: given.pop(key) for key in ("model", *shared)}
            told.pop("_debug")
            command(Asked(command=name, **told), **given)

        seen = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in (model, *own, *ordered)]
        run.__signature__ = Signature(seen)  # type: ignore[attr-defined]  # what Typer looks at
        run.__annotations__ = {each.name: each.annotation for each in seen}
        return run

    return decorate
