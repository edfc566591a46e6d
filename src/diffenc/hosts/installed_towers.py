"""Towers in a host's model, and their names in its config."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from diffenc.hosts.tower import DiffusionVisionTower


def spec_of(cfg: Any, part: str = "vision_tower") -> str | None:
    """The name of the tower in a host's config or arguments, or None.

    Args:
        cfg: Config or arguments of the host.
        part: Name of the part that the tower is, which the host's config has with "mm_" before.
    """
    for field in (f"mm_{part}", part):
        name = getattr(cfg, field, None)
        if isinstance(name, str):
            return name
    return None


def specs_of(cfg: Any, part: str) -> list[str] | None:
    """The names of several towers in a host's config or arguments, or None.

    Args:
        cfg: Config or arguments of the host.
        part: Name of the list, which the host's config has with "mm_" before.
    """
    for field in (f"mm_{part}", part):
        names = getattr(cfg, field, None)
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            return list(names)
    return None


def towers_of(model: nn.Module) -> Iterator[DiffusionVisionTower]:
    """Every tower of a host's model, those that it keeps in lists included."""
    visited: set[int] = set()
    for module in model.modules():
        held = [module, *(item for value in vars(module).values() for item in _listed(value))]
        for candidate in held:
            if isinstance(candidate, DiffusionVisionTower) and id(candidate) not in visited:
                visited.add(id(candidate))
                yield candidate


def number_of_towers(model: nn.Module) -> int | None:
    """How many towers a host keeps in the list that holds diffenc's; None where it has one alone.

    LLaVA puts its one tower into a list under FSDP, and has `get_vision_tower` all the same.
    """
    if hasattr(model, "get_vision_tower"):
        return None
    for module in model.modules():
        for value in (*vars(module).values(), *module.children()):
            held = list(value) if isinstance(value, nn.ModuleList) else _listed(value)
            if any(isinstance(item, DiffusionVisionTower) for item in held):
                return len(held)
    return None


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else ()
