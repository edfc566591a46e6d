"""LLaVA's training script with prompts, without a change to it."""

import functools
from typing import Any

from diffenc.errors import ConfigError
from diffenc.hosts.llava.callback import AdapterCallback
from diffenc.hosts.llava.data import PromptCollator, PromptDataset
from diffenc.hosts.llava.prompting import model_classes, take_prompts
from diffenc.hosts.llava.register import Registration, import_part, register
from diffenc.hosts.prompts import PromptTokenizer
from diffenc.inputs.policies import PromptPolicy, parse_policy


def train_with_prompts(
    package: str = "llava", policy: str | PromptPolicy = "question", *, seed: int = 0
) -> Registration:
    """Prepare a fork's `train.train`, whose `train()` then shows prompts to the tower.

    Its models take prompts, its dataset draws them, its collator tokenizes them, and its trainer
    writes the adapter beside every checkpoint. A script for LLaVA itself:

    ```python
    train_with_prompts("llava", "question")
    from llava.train.train import train

    train()
    ```

    Args:
        package: Top-level module of the fork, as for `register`, which this calls.
        policy: Policy that makes the prompts, see `diffenc.inputs.policies.parse_policy`.
        seed: Seed of what the policy draws.

    Raises:
        ConfigError: The package is not laid out as LLaVA's, or the policy does not parse.
    """
    chosen = parse_policy(policy) if isinstance(policy, str) else policy
    done = register(package)
    arch = import_part(package, "model.llava_arch")
    script = import_part(package, "train.train")
    make = getattr(script, "make_supervised_data_module", None)
    trainer = getattr(script, "LLaVATrainer", None)
    if make is None or trainer is None:
        raise ConfigError(
            f"{script.__name__} has no make_supervised_data_module or no LLaVATrainer; wrap its "
            "data with PromptDataset and PromptCollator by hand"
        )
    for cls in model_classes(arch):
        take_prompts(cls, patches=done.patches)
    done.patches.set(script, "make_supervised_data_module", _data_module(make, done, chosen, seed))
    done.patches.set(script, "LLaVATrainer", _trainer(trainer))
    return done


def _data_module(make: Any, done: Registration, policy: PromptPolicy, seed: int) -> Any:
    @functools.wraps(make)
    def make_supervised_data_module(*args: Any, **kwargs: Any) -> dict[str, Any]:
        module: dict[str, Any] = make(*args, **kwargs)
        if not done.specs:
            return module  # another tower, which reads no prompts
        tokenizer = PromptTokenizer(done.specs[-1].model)
        datasets = {
            name: PromptDataset(dataset, policy, seed)
            for name, dataset in module.items()
            if name.endswith("_dataset") and dataset is not None
        }
        return {
            **module,
            **datasets,
            "data_collator": PromptCollator(module["data_collator"], tokenizer),
        }

    return make_supervised_data_module


def _trainer(trainer: Any) -> Any:
    class LLaVATrainer(trainer):  # type: ignore[misc]
        """The host's, which also writes adapters."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(AdapterCallback())

    return LLaVATrainer
