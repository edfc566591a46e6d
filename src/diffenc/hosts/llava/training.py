"""LLaVA's training script with prompts, without a change to it."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from diffenc.checks.arguments import shown
from diffenc.errors import ConfigError
from diffenc.hosts.llava.callback import AdapterCallback
from diffenc.hosts.llava.data import PromptCollator, PromptDataset
from diffenc.hosts.llava.layout import import_part, names_used, splicing_models, trainer_of
from diffenc.hosts.llava.prompting import take_prompts
from diffenc.hosts.llava.register import Registration, register, registration_of
from diffenc.hosts.prompts import PromptTokenizer
from diffenc.hosts.spec import PREFIX
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.inputs.policies import PromptPolicy, parse_policy

_MAKE_DATA = "make_supervised_data_module"


def train_with_prompts(
    package: str = "llava",
    policy: str | PromptPolicy = "question",
    *,
    seed: int = 0,
    script: "str | ModuleType" = "train.train",
    models: "type[nn.Module] | Sequence[type[nn.Module]] | None" = None,
    trainer: str | None = None,
) -> Registration:
    """Prepare a fork's training script, whose `train()` then shows prompts to the tower.

    Its models take prompts, its dataset draws them, its collator tokenizes them, and its trainer
    writes the adapter beside every checkpoint. A script for LLaVA itself:

    ```python
    train_with_prompts("llava", "question")
    from llava.train.train import train

    train()
    ```

    Args:
        package: Top-level module of the fork, as for `register`, which this calls. Call `register`
            before, with its own arguments, if the fork's builder or loader has another place.
        policy: Policy that makes the prompts, see `diffenc.inputs.policies.parse_policy`.
        seed: Seed of what the policy draws.
        script: Module with the fork's `train()` and `make_supervised_data_module`: the part of the
            package, or the imported module for scripts outside of it.
        models: Class that takes prompts, or several; None takes every class of the package that
            splices images into text and generates.
        trainer: Name, in the script, of the trainer that `train()` makes; None finds it.

    Raises:
        ConfigError: Something that is to be exchanged is not there or is not used by `train()`, or
            the policy does not parse. The package is left as it was.
    """
    chosen = parse_policy(policy) if isinstance(policy, str) else policy
    before = registration_of(package)
    done = register(package) if before is None else before
    count = done.patches.count
    try:
        _prepare_script(done, chosen, seed, script, models, trainer)
    except ConfigError:
        if before is None:
            done.undo()
        done.patches.undo(count)
        raise
    return done


def _prepare_script(
    done: Registration,
    policy: PromptPolicy,
    seed: int,
    script: "str | ModuleType",
    models: "type[nn.Module] | Sequence[type[nn.Module]] | None",
    trainer: str | None,
) -> None:
    module = import_part(done.package, script) if isinstance(script, str) else script
    function = getattr(module, "train", None)
    if function is None:
        raise ConfigError(f"{module.__name__} has no train(); name the fork's script (script=)")
    make = getattr(module, _MAKE_DATA, None)
    used = names_used(function)
    if make is None or _MAKE_DATA not in used:
        raise ConfigError(
            f"{module.__name__}.train calls no {_MAKE_DATA}, through which prompts come into the "
            "data; hand them over by hand: take_prompts(model), prompted_data(data_module, tower), "
            "trainer.add_callback(AdapterCallback())"
        )
    name = trainer_of(module, function) if trainer is None else trainer
    if name not in used or not hasattr(getattr(module, name, None), "add_callback"):
        raise ConfigError(f"{module.__name__}.train makes no trainer {name!r} that takes callbacks")
    chosen = splicing_models(done.package) if models is None else models
    classes = [chosen] if isinstance(chosen, type) else list(chosen)
    if not classes:
        raise ConfigError("models must be one class or more, got none")
    for each in classes:
        take_prompts(each, patches=done.patches)
    done.patches.set(module, _MAKE_DATA, _data_module(make, done, policy, seed))
    done.patches.set(module, name, _trainer(getattr(module, name)))


def prompted_data(
    data_module: "dict[str, Any]",
    tower: DiffusionVisionTower,
    policy: str | PromptPolicy = "question",
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """A fork's datasets and collator with prompts, for training scripts that are edited by hand.

    With `take_prompts(model)` before and `trainer.add_callback(AdapterCallback())` after, this is
    what `train_with_prompts` does.

    Args:
        data_module: What LLaVA's `make_supervised_data_module` returns: datasets under names that
            end in ``_dataset``, and ``data_collator``.
        tower: Tower that reads the prompts.
        policy: Policy that makes the prompts, see `diffenc.inputs.policies.parse_policy`.
        seed: Seed of what the policy draws.

    Returns:
        The same keys; each dataset draws a prompt for each sample, and batches have
        ``vision_prompt_ids`` and ``vision_prompt_mask``.

    Raises:
        ConfigError: There is no collator or no dataset, a dataset keeps no `list_data_dict`, the
            policy does not parse, or the tower is none of diffenc's.
    """
    tokenizer = getattr(tower, "tokenizer", None)
    if not isinstance(tokenizer, PromptTokenizer):
        raise ConfigError(
            f"prompts are for a tower of diffenc, a DiffusionVisionTower, got {shown(tower)}; in "
            "LLaVA model.get_vision_tower() is the tower, once it was built by a name that begins "
            f"with {PREFIX!r}"
        )
    return _with_prompts(data_module, tokenizer, policy, seed)


def _with_prompts(
    data_module: "dict[str, Any]", tokenizer: PromptTokenizer, policy: str | PromptPolicy, seed: int
) -> dict[str, Any]:
    if not isinstance(data_module, Mapping):
        raise ConfigError(
            f"prompts need what {_MAKE_DATA} returns, a dict of datasets and a collator, got "
            f"{shown(data_module)}"
        )
    datasets = {
        name: PromptDataset(dataset, policy, seed)
        for name, dataset in data_module.items()
        if name.endswith("_dataset") and dataset is not None
    }
    if not datasets or data_module.get("data_collator") is None:
        raise ConfigError(
            "prompts need a dataset under a name such as train_dataset, and data_collator, got "
            f"{', '.join(data_module) or 'nothing'}"
        )
    collator = PromptCollator(data_module["data_collator"], tokenizer)
    return {**data_module, **datasets, "data_collator": collator}


def _data_module(make: Any, done: Registration, policy: PromptPolicy, seed: int) -> Any:
    @functools.wraps(make)
    def make_supervised_data_module(*args: Any, **kwargs: Any) -> dict[str, Any]:
        module: dict[str, Any] = make(*args, **kwargs)
        if not done.specs:
            warnings.warn(
                f"{done.package!r} has built no tower of a name that begins with 'diffenc:', so "
                "this training shows no prompts",
                stacklevel=2,
            )
            return module
        return _with_prompts(module, PromptTokenizer(done.specs[-1].model), policy, seed)

    return make_supervised_data_module


def _trainer(trainer: Any) -> Any:
    class LLaVATrainer(trainer):  # type: ignore[misc]
        """The host's, which also writes adapters."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(AdapterCallback())

    return LLaVATrainer
