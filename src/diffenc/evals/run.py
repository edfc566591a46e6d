"""Run a benchmark that a model answers: model, items, prompts of the encoder, answers, numbers."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffenc.errors import ConfigError, PromptError
from diffenc.evals.captions_file import read_captions, with_captions
from diffenc.evals.folder_answerer import FolderAnswerer
from diffenc.evals.hosted_vlm import HostedVLM, is_hosted
from diffenc.evals.saved_vlm import SavedVLM
from diffenc.evals.task import Ask, AskOptions, AskTask, Outcome
from diffenc.inputs.policies import PromptSample, parse_policy

if TYPE_CHECKING:
    from diffenc.evals.inspection import Progress

_OWN_POLICY = "model"
_CAPTION = "caption"
_CAPTION_TOKENS = (64, 32)
"""Largest number of tokens in an answer to one question on everything: real data, miniature."""


def run_task(
    task: AskTask,
    model: "str | os.PathLike[str]",
    options: AskOptions | None = None,
    *,
    results: "Path | None" = None,
    progress: "Progress | None" = None,
) -> Outcome:
    """Ask a saved model everything that a benchmark asks, and count.

    Args:
        task: Benchmark and its options, such as `Mmvp(data="shapes")`.
        model: Folder that `DiffusionVLM.save_pretrained` or `diffenc train` wrote, or checkpoint
            of LLaVA, its own or of transformers, with a tower of diffenc.
        options: How the model is asked; None takes the defaults.
        results: JSON lines file that keeps the answers, so that nothing is asked twice; None keeps
            nothing.
        progress: Function that is called with the number of answers of a part and the number of all
            of them; None reports nothing.

    Raises:
        DiffencError: The model, the data or a library cannot be had, an option is not allowed, or
            the file is of something else.
    """
    if results is not None and not isinstance(results, (str, os.PathLike)):
        raise ConfigError(f"results must be the path of a .jsonl file or None, got {results!r}")
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress must be a function or None, got {progress!r}")
    ask = prepare_task(task, model, AskOptions() if options is None else options)
    return ask(None if results is None else Path(results), progress)


def prepare_task(task: AskTask, model: "str | os.PathLike[str]", options: AskOptions) -> Ask:
    """Check everything that can be checked before a model is loaded; the function that runs.

    Raises:
        DiffencError: See `run_task`.
    """
    if not isinstance(task, AskTask):
        raise ConfigError(
            f"task must be a benchmark that a model answers, such as Mmvp(data='shapes'), got "
            f"{task!r}"
        )
    if not isinstance(options, AskOptions):
        raise ConfigError(
            f"options must be AskOptions, such as AskOptions(seed=1), got {options!r}"
        )
    if not isinstance(model, (str, os.PathLike)) or isinstance(os.fspath(model), bytes):
        raise ConfigError(f"model must be the folder of a saved model, got {model!r}")
    task.check()
    captions = _captions(task, options)
    real, miniature = task.tokens if task.counts else _CAPTION_TOKENS
    kind: type[FolderAnswerer] = HostedVLM if is_hosted(model) else SavedVLM
    saved = kind(
        model,
        name=options.name,
        max_new_tokens=options.max_new_tokens or (miniature if task.miniature else real),
        device=options.torch_device,
        dtype=options.torch_dtype,
    )
    if options.guidance_scale is not None:
        saved = saved.guided(options.guidance_scale)
    policy = task.prompt_policy
    if policy is not None:
        own = saved.prompt_policy.split("|")[0] if policy == _OWN_POLICY else policy
        saved = saved.described(prompts=_policy(options, own))
    benchmark = task.load()
    if captions is not None:
        name = Path(str(options.captions)).name
        benchmark = with_captions(benchmark, captions, where=name, part=task.partial)
    prompts: dict[str, str] = {}
    if policy is not None:
        samples = {item.id: task.sample(item) for item in benchmark.items}
        if not task.counts:
            samples = {key: (str(task.question), texts) for key, (_, texts) in samples.items()}
        if captions is not None:
            samples = {key: (text, [captions[key]]) for key, (text, _) in samples.items()}
        prompts = _drawn_prompts(saved.description["prompts"], samples, options.seed)
    return task.prepare(benchmark, saved, prompts, options)


def _captions(task: AskTask, options: AskOptions) -> dict[str, str] | None:
    """Captions of the file that the options name; None where they name none.

    Raises:
        ConfigError: The file is of another form, or prompts are not for the caller to choose.
    """
    if options.captions is None:
        return None
    if task.prompt_policy is None:
        raise ConfigError(f"{task.name} makes its prompts itself and takes no captions")
    return read_captions(options.captions)


def _policy(options: AskOptions, own: str) -> str:
    """The policy that the options name, or a model's own, which reads captions where there are.

    Raises:
        ConfigError: A policy is of another form, or reads no captions where there are.
    """
    policy = str(parse_policy(options.prompts or own))
    if options.captions is None or _CAPTION in policy:
        return policy
    if options.prompts is not None:
        raise ConfigError(
            f"captions stand for {_CAPTION!r} in a prompt policy, and prompts={policy!r} has none; "
            f"write {policy.split('|')[0].strip()}+{_CAPTION}, or leave prompts out"
        )
    return _CAPTION if policy == "empty" else f"{policy}+{_CAPTION}"


def _drawn_prompts(
    policy: str, samples: Mapping[str, tuple[str, Sequence[str]]], seed: int
) -> dict[str, str]:
    """The encoder's prompt of each item, from its question and its captions.

    Raises:
        ConfigError: The policy needs what the items do not have.
    """
    draw = parse_policy(policy)
    try:
        return {
            name: draw(
                PromptSample(name, [{"from": "human", "value": question}], captions), seed=seed
            )
            for name, (question, captions) in samples.items()
        }
    except PromptError as error:
        raise ConfigError(f"{error}. The policy is {str(draw)!r}; see --prompts") from error
