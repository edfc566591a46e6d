"""A benchmark as one object: the options of a run, where its items come from, and how it is shown.

Nothing here imports torch: the commands read fields and docstrings of tasks to make their options.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from diffenc.checks.fields import conform
from diffenc.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from diffenc.evals.folder_answerer import FolderAnswerer
    from diffenc.evals.inspection import Progress
    from diffenc.evals.items import Benchmark
    from diffenc.evals.tables import Table

MINIATURE = "shapes"


def option(
    default: Any = None,
    *,
    metavar: str | None = None,
    least: int | None = None,
    flag: str | None = None,
    whole: bool = False,
) -> Any:
    """A field that a command line sets too.

    Args:
        default: Value where nothing is given.
        metavar: Word that stands for the value in the command's help.
        least: Smallest number that is allowed.
        flag: Name of the option if it is not the field's: "--metric" for `metrics`.
        whole: Whether a comma belongs to the text, as in names of folders, instead of beginning
            another one.
    """
    facts = {"metavar": metavar, "least": least, "flag": flag, "whole": whole}
    return field(default=default, metadata={key: value for key, value in facts.items() if value})


def check_options(options: Any) -> None:
    """Bring the fields of options to their types, and refuse numbers below the least one.

    Paths may be texts.

    Args:
        options: Instance of a dataclass whose fields `option` made, in its `__post_init__`.

    Raises:
        ConfigError: A value is of another type, or below the least number.
    """
    for each in fields(options):
        value = getattr(options, each.name)
        if _takes_paths(each.type):
            object.__setattr__(options, each.name, _as_path(value))
    conform(options)
    for each in fields(options):
        value, least = getattr(options, each.name), each.metadata.get("least")
        if least is not None and value is not None and value < least:
            raise ConfigError(f"{each.name} must be {least} or more, got {value!r}")


def _takes_paths(hint: Any) -> bool:
    return hint is Path or any(map(_takes_paths, get_args(hint)))


def _as_path(value: Any) -> Any:
    """Paths instead of texts, in a list or a tuple too; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return tuple(_as_path(each) for each in value)
    return Path(value) if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark and the options of one run of it.

    Attributes:
        data: Folder or .zip file of the download, its Hub id if it is in the Hub's cache, or
            shapes: the miniature. Nothing is downloaded.
        limit: Number of items that are taken, from the first, to try it out. Default all.
        data_seed: Seed of the scenes of the miniature; choose settings on another seed than the one
            you report.
    """

    name: ClassVar[str]

    data: str | os.PathLike[str] = field(metadata={"metavar": "PATH"})
    limit: int | None = option(metavar="N", least=1)
    data_seed: int | None = option()

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def miniature(self) -> bool:
        """Whether the items are the miniature's."""
        return self.data == MINIATURE

    @property
    def partial(self) -> bool:
        """Whether a part of the items is taken."""
        return self.limit is not None

    def load(self) -> "Benchmark[Any]":
        """Read the items.

        Raises:
            ConfigError: There is no such data, or an option does not go with it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Outcome:
    """What a run found, ready to be shown.

    Attributes:
        content: Every number, as JSON holds it.
        tables: Tables for people.
        notes: Remarks on data, readings and what was left out.
        count: Number of answers that the numbers are made from.
        fresh: Number of those that are new in this run.
    """

    content: Mapping[str, Any]
    tables: Sequence["Table"]
    notes: Sequence[str]
    count: int
    fresh: int


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """How a multimodal model is asked, the same for all benchmarks.

    Attributes:
        prompts: What the encoder reads: question, empty, or another policy, see the guide to
            training. Default that of the model's training; for captions: empty.
        captions: Captions of another run that stand for "caption" in --prompts: answers of one
            model that diffenc evaluate wrote, or JSON by id. Without --prompts they are read behind
            what the encoder reads otherwise.
        guidance_scale: Guidance scale s of the encoder's features f_u + s (f_c - f_u). Default as
            the model was trained.
        seed: Seed of what is drawn at random: by the prompt policy, or who gets whose caption.
        max_new_tokens: Largest number of tokens in an answer; default by the kind of question.
        batch_size: Number of questions per call of the model.
        skip_broken: Go on without pictures that cannot be read, and tell which.
        name: Name of the model in tables and files; default its folder's.
        paper: Show the paper's rows; default with real data alone.
        device: Device: cpu, cuda, cuda:1, mps; auto is cuda where there is one.
        dtype: Floating point type of the weights: float32, float16 or bfloat16.
    """

    prompts: str | None = option(metavar="POLICY")
    captions: Path | None = field(default=None, metadata={"metavar": "FILE"})
    guidance_scale: float | None = option(metavar="S")
    seed: int = 0
    max_new_tokens: int | None = option(metavar="N", least=1)
    batch_size: int = option(8, least=1)
    skip_broken: bool = False
    name: str | None = option(metavar="TEXT")
    paper: bool | None = None
    device: str = option("auto", metavar="NAME")
    dtype: str = option("float32", metavar="NAME")

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def torch_device(self) -> "torch.device":
        """The device; "auto" is CUDA where there is one."""
        from diffenc.models.device import named_device

        return named_device(self.device)

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The floating point type of the weights."""
        from diffenc.models.device import named_dtype

        return named_dtype(self.dtype)

    @property
    def asking(self) -> dict[str, Any]:
        """Keywords of every evaluation of answers."""
        return {"batch_size": self.batch_size, "skip_broken": self.skip_broken}


Ask = Callable[["Path | None", "Progress | None"], Outcome]
"""Function that asks everything, given the file of answers and what reports progress."""


@dataclass(frozen=True, kw_only=True)
class AskTask(Task):
    """A benchmark that a model answers.

    Attributes:
        question: Text that the model is asked on the pictures of every item, in place of the
            benchmark's questions. Its answers are shown and kept, nothing is counted: another run
            takes them by --captions.

    Class attributes tell how it is asked unless the options say otherwise: `tokens`, the largest
    number of tokens in an answer on real data and on the miniature; `prompt_policy`, "model" for
    the model's own without its noise and dropout, or None where the protocol has prompts itself;
    and `without`, the fields of `AskOptions` that mean nothing here.
    """

    tokens: ClassVar[tuple[int, int]]
    prompt_policy: ClassVar[str | None] = "model"
    without: ClassVar[tuple[str, ...]] = ()

    question: str | None = option(metavar="TEXT")

    @property
    def file(self) -> Path:
        """File that keeps the answers where none is named."""
        return Path(f"{self.name}-results.jsonl" if self.counts else f"{self.name}-captions.jsonl")

    @property
    def counts(self) -> bool:
        """Whether the benchmark's own questions are asked, and answers counted."""
        return self.question is None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of the work, in order, for a progress bar."""
        return ("asking",)

    def check(self) -> None:
        """Refuse options before a model is looked at.

        Raises:
            ConfigError: An option is not allowed.
            MissingExtraError: A library is not installed.
        """
        if self.question is not None and not self.question.strip():
            raise ConfigError("the question is empty; leave it out to ask the benchmark's own")

    def sample(self, item: Any) -> tuple[str, Sequence[str]]:
        """Question and true captions of an item, from which a prompt policy makes its prompt."""
        return item.question, ()

    def prepare(
        self,
        benchmark: Any,
        model: "FolderAnswerer",
        prompts: Mapping[str, str],
        options: AskOptions,
    ) -> Ask:
        """Make ready what the run needs, and return the function that runs.

        Args:
            benchmark: Result of `load`.
            model: Model that is asked, not loaded yet.
            prompts: Prompt of the encoder for each item, by id.
            options: How the model is asked.

        Raises:
            DiffencError: Something cannot be had; nothing was asked yet.
        """
        raise NotImplementedError


def refuse(owner: str, **options: object) -> None:
    """Raise a `ConfigError` if any of these options was given.

    Args:
        owner: Description of what the options belong to, for the message.
        options: Values of the options by name; None and False count as not given.
    """
    names = [name for name, value in options.items() if value is not None and value is not False]
    if names:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ConfigError(f"{flags} {'belong' if len(names) > 1 else 'belongs'} to {owner}")
