"""The tower behind the builder of LLaVA and its forks."""

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

from torch import nn

from diffenc.errors import ConfigError
from diffenc.hosts.installed_towers import spec_of, towers_of
from diffenc.hosts.llava.patches import Patches
from diffenc.hosts.spec import TowerSpec
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.storage.names import exists


class Registration:
    """What `register` did to a package.

    Attributes:
        package: Name of the package.
        specs: Specs of the towers that were built, in the order in which they were built.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.specs: list[TowerSpec] = []
        self.patches = Patches()

    def undo(self) -> None:
        """Leave the package as it was found."""
        self.patches.undo()


_DONE: dict[str, Registration] = {}


def register(package: str = "llava") -> Registration:
    """Let a fork of LLaVA build a diffusion tower for names that begin with "diffenc:".

    Its `build_vision_tower` is replaced in every module that imported it, and keeps building all
    other towers; its `load_pretrained_model` afterwards looks for the adapter. A second call
    changes nothing.

    Args:
        package: The fork's top-level module, such as "llava" or "bunny"; it is imported.

    Raises:
        ConfigError: The package is not there, or not laid out as LLaVA's.
    """
    if package in _DONE:
        return _DONE[package]
    builder = import_part(package, "model.multimodal_encoder.builder")
    loader = import_part(package, "model.builder")
    done = Registration(package)
    for module, name, wrap in (
        (builder, "build_vision_tower", _builder),
        (loader, "load_pretrained_model", _loader),
    ):
        original = getattr(module, name, None)
        if original is None:
            done.undo()
            raise ConfigError(
                f"{module.__name__} has no {name}; {package!r} is laid out in another way than "
                "LLaVA: build DiffusionVisionTower in its builder by hand"
            )
        done.patches.replace(package, name, original, wrap(original, done))
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


def import_part(package: str, part: str) -> ModuleType:
    """A module of a host's package.

    Raises:
        ConfigError: It cannot be imported.
    """
    try:
        return importlib.import_module(f"{package}.{part}")
    except ImportError as error:
        raise ConfigError(
            f"cannot import {package}.{part}: {error}. Put the fork's folder on the path (pip "
            "install -e . in it) and pass the name of its top-level module."
        ) from error


def _builder(original: Any, done: Registration) -> Any:
    @functools.wraps(original)
    def build_vision_tower(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        name = spec_of(cfg)
        if name is None or not TowerSpec.is_spec(name):
            return original(cfg, *args, **kwargs)
        tower = DiffusionVisionTower(name, args=cfg, **kwargs)
        done.specs.append(tower.spec)
        return tower

    return build_vision_tower


def _loader(original: Any, done: Registration) -> Any:
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
