"""The trainer and the options of a fork's script, for transformers newer than the fork's."""

import dataclasses
import inspect
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from diffenc.errors import ConfigError
from diffenc.hosts.llava.layout import names_used
from diffenc.hosts.llava.patches import Patches

SHARDING = "ShardedDDPOption"
_RENAMED_OPTIONS: dict[str, tuple[Any, str]] = {
    "evaluation_strategy": (str | None, "eval_strategy"),
    "warmup_ratio": (float | None, "warmup_steps"),  # below 1 a share of all steps
}


def modernize_trainer(trainer: type, patches: Patches) -> list[str]:
    """Let a fork's trainer be made, asked and answered as it was under transformers 4.37.

    Args:
        trainer: Trainer that the script makes.
        patches: Record of what is changed, to undo it.

    Returns:
        What was supplied.
    """
    from transformers import Trainer

    own = [each for each in trainer.__mro__ if issubclass(each, Trainer) and each is not Trainer]
    supplied = _supply_below(own[-1], patches) if own else []
    takes_dataset = len(inspect.signature(Trainer._get_train_sampler).parameters) > 1
    for each in own:
        sampler = vars(each).get("_get_train_sampler")
        if takes_dataset and sampler and len(inspect.signature(sampler).parameters) == 1:
            patches.set(each, "_get_train_sampler", _ignoring_dataset(sampler))
            supplied.append(f"{each.__name__}._get_train_sampler: takes the dataset")
    return supplied


def _ignoring_dataset(sampler: Callable[[Any], Any]) -> Callable[..., Any]:
    """Forks ask for `self.train_dataset`, which is what transformers hands over."""

    def _get_train_sampler(self: Any, _train_dataset: Any = None) -> Any:
        return sampler(self)

    return _get_train_sampler


def _supply_below(lowest: type, patches: Patches) -> list[str]:
    """Put a class between the fork's trainer and transformers', which takes the old arguments."""
    from transformers import Trainer

    base: Any = next(each for each in lowest.__bases__ if issubclass(each, Trainer))
    parts: dict[str, Any] = {}
    if "tokenizer" not in inspect.signature(base.__init__).parameters:
        parts["__init__"] = _made_with_tokenizer(base)
    if "metrics" not in inspect.signature(base._save_checkpoint).parameters:
        parts["_save_checkpoint"] = _saved_without_metrics(base)
    if hasattr(sys.modules[lowest.__module__], SHARDING) and not hasattr(base, "sharded_ddp"):
        parts["sharded_ddp"] = None
    if not parts:
        return []
    between = type(base.__name__, (base,), {**parts, "__module__": __name__})
    patches.set_bases(lowest, tuple(between if each is base else each for each in lowest.__bases__))
    reasons = {
        "__init__": f"{lowest.__name__}(tokenizer=): processing_class",
        "_save_checkpoint": f"{lowest.__name__}._save_checkpoint: hands on no metrics",
        "sharded_ddp": f"{lowest.__name__}.sharded_ddp: none",
    }
    return [reasons[name] for name in parts]


def _made_with_tokenizer(base: Any) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, tokenizer: Any = None, **kwargs: Any) -> None:  # noqa: N807
        if tokenizer is not None:
            kwargs["processing_class"] = tokenizer
        base.__init__(self, *args, **kwargs)

    return __init__


def _saved_without_metrics(base: Any) -> Callable[..., Any]:
    def _save_checkpoint(self: Any, model: Any, trial: Any, metrics: Any = None) -> Any:
        return base._save_checkpoint(self, model, trial)

    return _save_checkpoint


def modernize_arguments(script: ModuleType, function: FunctionType, patches: Patches) -> list[str]:
    """Let a fork's `TrainingArguments` take the options that transformers has renamed.

    Args:
        script: Module of the fork's training script.
        function: Its `train()`.
        patches: Record of what is changed, to undo it.

    Returns:
        What was supplied.

    Raises:
        ConfigError: `train()` reads its options with no class of the script, or an option has not
            the name any more that is written for it.
    """
    import transformers

    classes = [
        name
        for name in sorted(names_used(function))
        if isinstance(each := getattr(script, name, None), type)
        and issubclass(each, transformers.TrainingArguments)
        and each is not transformers.TrainingArguments
    ]
    if len(classes) != 1:
        raise ConfigError(
            f"--evaluation_strategy and --warmup_ratio cannot be supplied: {script.__name__}.train "
            f"reads its options with {', '.join(classes) or 'no class'} of transformers' "
            "TrainingArguments, where one was expected"
        )
    stock: Any = getattr(script, classes[0])
    present = {field.name for field in dataclasses.fields(stock)}
    missing = {old: pair for old, pair in _RENAMED_OPTIONS.items() if old not in present}
    if not missing:
        return []
    for old, (_, new) in missing.items():
        if new not in present:
            raise ConfigError(
                f"--{old} cannot be supplied: transformers {transformers.__version__} has no "
                f"--{new} either"
            )
    patches.replace(classes[0], stock, _taking(stock, missing))
    return [f"--{old}: --{new}" for old, (_, new) in missing.items()]


def _taking(stock: Any, missing: dict[str, tuple[Any, str]]) -> Any:
    """A dataclass of options with further ones, which set the new ones."""

    def __post_init__(self: Any) -> None:  # noqa: N807
        if "evaluation_strategy" in missing and self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if "warmup_ratio" in missing and (ratio := self.warmup_ratio) is not None:
            if not 0 <= ratio < 1:
                raise ConfigError(f"--warmup_ratio is a share of all steps below 1, got {ratio}")
            self.warmup_steps = self.warmup_steps or ratio  # steps that are named win, as ever
        stock.__post_init__(self)

    fields = [
        (old, kind, dataclasses.field(default=None, metadata={"help": f"The --{new} of today."}))
        for old, (kind, new) in missing.items()
    ]
    made = dataclasses.make_dataclass(
        stock.__name__, fields, bases=(stock,), namespace={"__post_init__": __post_init__}
    )
    made.__module__, made.__qualname__ = stock.__module__, stock.__qualname__
    return made
