"""LLaVA's code under transformers newer than the 4.37.2 that it pins.

What transformers renamed, moved or calls in another way since is supplied under the old name:
names that the fork imports, its trainer's calls, options of its scripts, and what `generate` hands
to its models. Nothing of the fork's is changed on disk, and nothing that is there is replaced.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from diffenc.errors import ConfigError
from diffenc.hosts.llava.layout import (
    import_architectures,
    import_part,
    loaded_modules,
    splicing_models,
    trainer_of,
)
from diffenc.hosts.llava.modern_trainer import SHARDING, modernize_arguments, modernize_trainer
from diffenc.hosts.llava.patches import Patches
from diffenc.storage.names import is_folder

_TRAINER = "transformers.trainer"


class Modernization:
    """What `modernize` supplied to a package.

    Attributes:
        package: Name of the package.
        script: Module of its training script; None where training was left aside.
        supplied: Names of what was supplied, with the reason; empty where nothing was missing.
        model_types: Kinds of models by which transformers now knows the fork's, not its own.
    """

    def __init__(self, package: str, script: "str | ModuleType | None") -> None:
        self.package, self.script = package, script
        self.supplied: list[str] = []
        self.patches = Patches()
        self.model_types: list[str] = []

    def undo(self) -> None:
        """Leave transformers and the package as they were found."""
        _DONE.pop((self.package, self.script), None)
        self.patches.undo()
        for name in self.model_types:
            CONFIG_MAPPING._extra_content.pop(name, None)


_DONE: dict[tuple[str, "str | ModuleType | None"], Modernization] = {}


def modernize(
    package: str = "llava",
    *,
    script: "str | ModuleType | None" = "train.train",
    trainer: str | None = None,
) -> Modernization:
    """Let a fork of LLaVA run under today's transformers; call it before all else.

    It pins transformers 4.37.2. What later versions lack is supplied, each only where it is
    missing, so that under 4.37.2 nothing is done:

    * `ALL_LAYERNORM_LAYERS`, `get_parameter_names` and `ShardedDDPOption` of
      `transformers.trainer`, which trainers of forks import;
    * `tokenizer` of its trainer (`processing_class` of today), the dataset that its
      `_get_train_sampler` gets, the metrics that its `_save_checkpoint` hands on;
    * `--evaluation_strategy` (`--eval_strategy`) and `--warmup_ratio` (`--warmup_steps`) of its
      training script;
    * `maybe_zero_3`, which gathers weights, where deepspeed is not installed;
    * names of masks that only the MPT of older forks needs, so that their other models import;
    * the name "llava" of a fork's models, which transformers has given to its own since;
    * `cache_position`, which `generate` of transformers 4.40 to 4.57 hands to models that do not
      know it.

    Args:
        package: Top-level module of the fork; it is imported.
        script: Module with the fork's `train()`: the part of the package, or the imported module
            for a script outside of it, whose import may want a call with None before. None leaves
            training aside.
        trainer: Name, in the script, of the trainer that `train()` makes; None finds it.

    Returns:
        What was supplied. A second call for a script returns the first one's.

    Raises:
        ConfigError: Something cannot be supplied, with its name; nothing is changed then.

    Source:
        haotian-liu/LLaVA, commit c121f04, under transformers 4.37.2, 4.48.3, 4.57.6 and 5.23.0.
    """
    if (package, script) in _DONE:
        return _DONE[package, script]
    done = Modernization(package, script)
    try:
        _supply_names(done)
        _supply_masks(done)
        with _fork_names_its_models(done):
            module = _import_fork(package, script)
        if module is not None:
            _modernize_script(done, module, trainer)
        _without_deepspeed(done)
        for model in splicing_models(package):
            _without_cache_position(done, model)
    except ConfigError:
        done.undo()
        raise
    _DONE[package, script] = done
    return done


def _import_fork(package: str, script: "str | ModuleType | None") -> ModuleType | None:
    """Import a fork's models, their loader and its script, which is returned."""
    import_part(package, "model")
    import_architectures(package)
    builder = f"{package}.model.builder"
    if builder not in sys.modules and importlib.util.find_spec(builder) is not None:
        import_part(package, "model.builder")
    return import_part(package, script) if isinstance(script, str) else script


@contextmanager
def _fork_names_its_models(done: Modernization) -> Iterator[None]:
    """A block in which a fork may call its models "llava", as transformers calls its own since.

    From then on the name means the fork's: its checkpoints are loaded by it.
    """
    kinds: list[Any] = [type(CONFIG_MAPPING), _LazyAutoMapping]
    stock = [kind.register for kind in kinds]
    before = set(CONFIG_MAPPING._extra_content)

    def permitting(register: Any) -> Any:
        def register_anyway(self: Any, key: Any, value: Any, exist_ok: bool = False) -> None:
            register(self, key, value, exist_ok=True)

        return register_anyway

    for kind, register in zip(kinds, stock, strict=True):
        kind.register = permitting(register)
    try:
        yield
    finally:
        for kind, register in zip(kinds, stock, strict=True):
            kind.register = register
        registered = set(CONFIG_MAPPING._extra_content) - before
        done.model_types = sorted(registered & set(CONFIG_MAPPING._mapping))
        done.supplied += [f"AutoConfig of {name!r}: the fork's" for name in done.model_types]


def _supply_names(done: Modernization) -> None:
    """Names that forks import from `transformers.trainer`."""
    module = importlib.import_module(_TRAINER)
    for name, supply in (
        ("ALL_LAYERNORM_LAYERS", _norms),
        ("get_parameter_names", _parameter_names),
        (SHARDING, _no_sharding),
    ):
        if not hasattr(module, name):
            done.patches.set(module, name, supply())
            done.supplied.append(f"{_TRAINER}.{name}")


def _supply_masks(done: Modernization) -> None:
    """Names of masks that the MPT of older forks imports, and nothing else of them calls."""
    loaded = sys.modules.get(done.package)
    spec = importlib.util.find_spec(done.package) if loaded is None else None
    places = getattr(loaded, "__path__", ()) if spec is None else spec.submodule_search_locations
    folders = [Path(place) / "model" / "language_model" / "mpt" for place in places or ()]
    if not any(is_folder(folder) for folder in folders):
        return
    for kind in ("bloom", "opt"):
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        for name in ("_expand_mask", "_make_causal_mask"):
            if not hasattr(module, name):
                done.patches.set(module, name, _refusing(f"{module.__name__}.{name}"))
                done.supplied.append(f"{module.__name__}.{name}: refuses to be called")


def _refusing(name: str) -> Any:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ConfigError(f"{name} is gone from transformers, and the fork's MPT needs it")

    return refuse


def _norms() -> list[type[nn.Module]]:
    """Layers whose weights do not decay: what the list held when it was last there."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm

    return [nn.LayerNorm, LlamaRMSNorm, MistralRMSNorm]


def _no_sharding() -> Any:
    """Ways of fairscale, which transformers no longer calls; a trainer is in none of them."""
    return Enum(SHARDING, {"SIMPLE": "simple", "OFFLOAD": "offload", "ZERO_DP_2": "zero_dp_2"})


def _parameter_names() -> Any:
    import transformers

    module = importlib.import_module("transformers.trainer_pt_utils")
    function = getattr(module, "get_parameter_names", None)
    if function is None:
        raise ConfigError(
            f"get_parameter_names cannot be supplied: transformers {transformers.__version__} has "
            "it neither in transformers.trainer nor in transformers.trainer_pt_utils. Take a "
            "version that was tested: 4.37.2, 4.48.3, 4.57.6 or 5.23.0"
        )
    return function


def _modernize_script(done: Modernization, script: ModuleType, trainer: str | None) -> None:
    from transformers import Trainer

    function = getattr(script, "train", None)
    if function is None:
        raise ConfigError(
            f"{script.__name__} has no train(); name the fork's script (script=), or pass None "
            "where nothing is to be trained"
        )
    name = trainer_of(script, function) if trainer is None else trainer
    chosen = getattr(script, name, None)
    if not (isinstance(chosen, type) and issubclass(chosen, Trainer)):
        raise ConfigError(f"{script.__name__} has no trainer {name!r} of transformers' kind")
    done.supplied += modernize_trainer(chosen, done.patches)
    done.supplied += modernize_arguments(script, function, done.patches)


def _without_deepspeed(done: Modernization) -> None:
    """`maybe_zero_3` imports deepspeed even where nothing is gathered."""
    if importlib.util.find_spec("deepspeed") is not None:
        return
    scripts = [done.script] if isinstance(done.script, ModuleType) else []
    for module in [*loaded_modules(done.package), *scripts]:
        if inspect.isfunction(getattr(module, "maybe_zero_3", None)):
            done.patches.set(module, "maybe_zero_3", _whole)
            done.supplied.append(f"{module.__name__}.maybe_zero_3: deepspeed is not installed")


def _whole(param: Tensor, *_: Any, **__: Any) -> Tensor:
    """A weight on the CPU; without deepspeed each is whole."""
    return param.detach().cpu().clone()


def _without_cache_position(done: Modernization, model: type[nn.Module]) -> None:
    """Take `cache_position` from the inputs of a model that computes it itself."""
    prepare: Any = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is None or _takes(model.forward, "cache_position") or not _hands(model):
        return
    if hasattr(prepare, "counts_itself"):
        return

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(self, *args, **kwargs)
        inputs.pop("cache_position", None)
        return inputs

    prepare_inputs_for_generation.counts_itself = True  # type: ignore[attr-defined]
    prepare_inputs_for_generation.__signature__ = inspect.signature(  # type: ignore[attr-defined]
        prepare
    )
    done.patches.set(model, "prepare_inputs_for_generation", prepare_inputs_for_generation)
    done.supplied.append(f"{model.__name__}.prepare_inputs_for_generation: no cache_position")


def _takes(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(each.name == name or each.kind is each.VAR_KEYWORD for each in parameters)


def _hands(model: type[nn.Module]) -> bool:
    """Whether transformers' own preparation of a model's inputs makes `cache_position`."""
    return any(
        "cache_position" in inspect.signature(own).parameters
        for each in model.__mro__
        if each.__module__.startswith("transformers.")
        and (own := vars(each).get("prepare_inputs_for_generation")) is not None
    )
