"""Numbers of parameters of what is compared."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from diffenc.evals.tables import Table

IMAGE, TEXT, WHOLE = "image tower", "text tower", "whole"
_MILLION = 1e6


def tower_sizes(model: nn.Module, *image: nn.Module) -> dict[str, int]:
    """Numbers of parameters of both towers and of the whole.

    Args:
        model: Whole model. What is neither image tower nor a single number, such as the scale of
            the cosine, is its text tower.
        image: Parts of it that see pictures.
    """
    whole, pictures = _count([model]), _count(image)
    single = sum(p.numel() for p in model.parameters() if p.numel() == 1)
    return {IMAGE: pictures, TEXT: whole - pictures - single, WHOLE: whole}


def _count(parts: Iterable[nn.Module]) -> int:
    return sum({id(p): p.numel() for part in parts for p in part.parameters()}.values())


def size_table(sizes: Mapping[str, Mapping[str, int]], published: Mapping[str, float]) -> Table:
    """Make a table with one row per model, in millions.

    Args:
        sizes: Sizes of each model by name, as `tower_sizes` gives them.
        published: Sizes of the paper's models, in millions, by name.
    """
    rows: list[tuple[Any, ...]] = [
        (name, *(f"{each[part] / _MILLION:.1f}" for part in (IMAGE, TEXT, WHOLE)))
        for name, each in sizes.items()
    ]
    rows += [(f"paper: {name}", "–", "–", f"{size:.1f}") for name, size in published.items()]
    title = "parameters, millions; of a diffusion model the paper counts the U-Net alone"
    return Table(title, ("model", IMAGE, TEXT, WHOLE), tuple(rows))
