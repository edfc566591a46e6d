"""The tower behind the builder of LLaVA and its forks."""

import copy
import functools
import warnings
from typing import Any

from torch import nn

from diffenc.config import described
from diffenc.errors import ConfigError
from diffenc.hosts.installed_towers import spec_of, specs_of, towers_of
from diffenc.hosts.llava.layout import function_at, require_caller, require_one_value
from diffenc.hosts.llava.patches import Patches
from diffenc.hosts.spec import TowerSpec
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.storage.names import exists


class Registration:
    """What `register` did to a package.

    Attributes:
        package: Name of the package.
        builder: Place of the builder that was replaced.
        loader: Place of the loader that was replaced; None where none was.
        specs: Specs of the towers that were built, in the order in which they were built.
    """

    def __init__(self, package: str, builder: str, loader: str | None) -> None:
        self.package, self.builder, self.loader = package, builder, loader
        self.specs: list[TowerSpec] = []
        self.patches = Patches()

    def __repr__(self) -> str:
        facts: dict[str, object] = {
            "package": self.package,
            "builder": self.builder,
            "loader": self.loader,
            "specs": tuple(map(str, self.specs)),
        }
        return described(type(self).__name__, facts)

    def undo(self) -> None:
        """Leave the package as it was found."""
        self.patches.undo()


_DONE: dict[str, Registration] = {}


def register(
    package: str = "llava",
    *,
    builder: str = "model.multimodal_encoder.builder:build_vision_tower",
    loader: str | None = "model.builder:load_pretrained_model",
) -> Registration:
    """Let a fork of LLaVA build a diffusion tower for names that begin with "diffenc:".

    Its builder is replaced in every module that imported it, and keeps building all other towers;
    its loader afterwards looks for the adapter. A second call changes nothing.

    Args:
        package: The fork's top-level module, such as "llava" or "bunny"; it is imported.
        builder: Function that builds a tower of a config, as "module:function" inside the package.
            ``build_<part>`` reads the name in the config's ``mm_<part>``, else ``<part>``; where
            that is a list of names, the builder makes a list of towers.
        loader: Function that loads a checkpoint; None leaves adapters to `tower.load_adapter`.

    Raises:
        ConfigError: The package is not there, has no such functions, never calls the builder, takes
            several values from its tower, or was registered with other places; then it is left as
            it was.
    """
    if (done := _DONE.get(package)) is not None:
        if (builder, loader) != (done.builder, done.loader):
            raise ConfigError(
                f"{package!r} was registered with builder={done.builder!r} and "
                f"loader={done.loader!r}; undo() that registration first"
            )
        return done
    done = Registration(package, builder, loader)
    module, name = function_at(package, builder)
    require_caller(package, module, name)
    require_one_value(package)
    loads = None if loader is None else function_at(package, loader)
    build = getattr(module, name)
    done.patches.replace(name, build, _builder(build, done, name.removeprefix("build_")))
    if loads is not None:
        load = getattr(*loads)
        done.patches.replace(loads[1], load, _loader(load))
    _DONE[package] = done
    undo = done.patches.undo

    def forget() -> None:
        _DONE.pop(package, None)
        undo()

    done.undo = forget  # type: ignore[method-assign]
    return done


def registration_of(package: str) -> Registration | None:
    """What was done to a package so far, if anything."""
    return _DONE.get(package)


def _builder(original: Any, done: Registration, part: str) -> Any:
    @functools.wraps(original)
    def build_vision_tower(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        names = specs_of(cfg, part)
        if names is not None:
            others = _other_towers(original, cfg, part, names)(*args, **kwargs)
            return [
                made(name, cfg, kwargs) if TowerSpec.is_spec(name) else others.pop(0)
                for name in names
            ]
        name = spec_of(cfg, part)
        if name is None or not TowerSpec.is_spec(name):
            return original(cfg, *args, **kwargs)
        return made(name, cfg, kwargs)

    def made(name: str, cfg: Any, kwargs: dict[str, Any]) -> DiffusionVisionTower:
        tower = DiffusionVisionTower(name, args=cfg, **kwargs)
        done.specs.append(tower.spec)
        return tower

    return build_vision_tower


def _other_towers(original: Any, cfg: Any, part: str, names: list[str]) -> Any:
    """The host's builder for those of its towers that are not diffenc's.

    The config's other lists about towers, such as their numbers of tokens, lose the same entries.

    Raises:
        ConfigError: One of these lists asks for another number of tokens than a spec has.
    """
    stem = part.removesuffix("_list")
    lists = {
        field: list(value)
        for field, value in vars(cfg).items()
        if field.startswith((stem, f"mm_{stem}"))
        and isinstance(value, (list, tuple))
        and len(value) == len(names)
    }
    kept = [index for index, name in enumerate(names) if not TowerSpec.is_spec(name)]
    for index in set(range(len(names))) - set(kept):
        _check_tokens(names[index], {field: value[index] for field, value in lists.items()})

    def build(*args: Any, **kwargs: Any) -> list[Any]:
        if not kept:
            return []
        rest = copy.copy(cfg)
        for field, value in lists.items():
            setattr(rest, field, [value[index] for index in kept])
        return list(original(rest, *args, **kwargs))

    return build


def _check_tokens(name: str, fields: dict[str, Any]) -> None:
    spec = TowerSpec.parse(name)
    for field, value in fields.items():
        if field.endswith("token_len_list") and value != spec.num_patches:
            side = round(value**0.5)
            raise ConfigError(
                f"{field} expects {value} tokens of {name!r}, which has {spec.num_patches}; put "
                f"grid={side} into the spec, or {spec.num_patches} into the list"
            )


def _loader(original: Any) -> Any:
    @functools.wraps(original)
    def load_pretrained_model(
        model_path: Any, model_base: Any = None, *args: Any, **kw: Any
    ) -> Any:
        loaded = original(model_path, model_base, *args, **kw)
        for part in loaded:
            if isinstance(part, nn.Module):
                restore_adapters(part, [model_path, model_base])
        return loaded

    return load_pretrained_model


def restore_adapters(model: nn.Module, sources: "list[str | None]") -> None:
    """Give a host's towers the adapters of its checkpoint, and tell of those that have none.

    Args:
        model: Model of the host.
        sources: Checkpoint folders; the first that has an adapter counts.

    Raises:
        ConfigError: The adapter belongs to another spec.
    """
    folders = [source for source in sources if source is not None and exists(source)]
    for tower in towers_of(model):
        if tower.adapter is None or any(tower.load_adapter(folder) for folder in folders):
            continue
        warnings.warn(
            f"none of {sources} holds the adapter of {tower.vision_tower_name!r}; it is a new one, "
            "which changes nothing. Load a trained one with tower.load_adapter(folder).",
            stacklevel=3,
        )
