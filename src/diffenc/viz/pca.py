"""Feature maps as colours: their first principal components as red, green and blue."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float64
from PIL import Image

from diffenc.errors import ConfigError, ShapeError
from diffenc.viz.arrays import Resample, pil_filter, pil_size, to_array


def pca_maps(
    maps: Sequence[Any],
    components: int = 3,
    *,
    leave_out: Sequence[Any] | None = None,
    size: int | tuple[int, int] | None = None,
    resample: Resample = "nearest",
) -> list[list[Image.Image]]:
    """Draw feature maps in one common colour scheme.

    One basis and one range are fitted to all cells of all maps: equal features have equal colours
    anywhere in the result, and what differs in colour differs in its features. Every component is
    stretched to the full range of its colour, from the 1st to the 99th percentile. Equal input
    gives equal pictures: a component points to where its largest weight is positive.

    Args:
        maps: Feature maps (b c h w), tensors or arrays, all with the same channels; sizes and
            batches may differ.
        components: Number of principal components: 3 for colours, 1 for grey.
        leave_out: For each of `maps` the cells (b h w) that have no part in basis and range, and
            are drawn white, such as those of `Features.registers`; None leaves out none.
        size: Size of each picture in pixels, as one side or (height, width); None is one pixel per
            cell.
        resample: Way of resizing: "nearest" shows the cells, "bicubic" smooths them.

    Returns:
        For each of `maps` one RGB picture per row of its batch.

    Raises:
        ShapeError: No map, one that is not (b c h w), or different channels; cells to leave out
            that do not fit the maps, or are all there are.
        NonFiniteError: A map holds NaN or infinity.
        ConfigError: Another number of components.
    """
    if components not in (1, 3):
        raise ConfigError(f"components must be 3 (colours) or 1 (grey), got {components}")
    arrays = [to_array(features, "b c h w") for features in maps]
    channels = sorted({array.shape[1] for array in arrays})
    if len(channels) != 1:
        raise ShapeError(
            f"maps of one picture must have the same channels, got {channels or 'none'}; "
            "draw each tap by itself"
        )
    flat = [rearrange(array, "b c h w -> (b h w) c") for array in arrays]
    kept = _kept_cells(arrays, leave_out)
    cells = np.concatenate([part[keep] for part, keep in zip(flat, kept, strict=True)])
    if not len(cells):
        raise ShapeError("every cell is to be left out; a picture needs one cell or more")
    mean = cells.mean(axis=0)
    basis = principal_components(cells - mean, components)
    projected = [(part - mean) @ basis for part in flat]
    low, high = np.percentile((cells - mean) @ basis, (1, 99), axis=0)
    span = np.where(high > low, high - low, 1)
    flat_color = np.where(high > low, 0, 0.5)  # what never varies is mid-grey
    pictures = []
    for array, part, keep in zip(arrays, projected, kept, strict=True):
        unit = np.clip((part - low) / span + flat_color, 0, 1)
        unit[~keep] = 1
        grid = rearrange(unit, "(b h w) k -> b h w k", b=len(array), h=array.shape[2])
        pictures.append([_to_picture(image, size, resample) for image in grid])
    return pictures


def _kept_cells(
    arrays: Sequence[np.ndarray], leave_out: Sequence[Any] | None
) -> list[Bool[np.ndarray, " n"]]:
    """Whether each cell of each map is kept, in the order of the flattened maps."""
    shapes = [(len(array), *array.shape[2:]) for array in arrays]
    if leave_out is None:
        return [np.ones(math.prod(shape), dtype=bool) for shape in shapes]
    masks = [to_array(mask, "b h w") != 0 for mask in leave_out]
    if [mask.shape for mask in masks] != shapes:
        raise ShapeError(
            f"leave_out must have a mask (b h w) for each map, of the shapes {shapes}, got "
            f"{[mask.shape for mask in masks]}"
        )
    return [~mask.ravel() for mask in masks]


def principal_components(
    centered: Float64[np.ndarray, "n c"], count: int
) -> Float64[np.ndarray, "c count"]:
    """Directions of largest variance as unit columns, largest first; zeros where there is none.

    The sign is fixed: the largest weight of a column, by magnitude, is positive.
    """
    n, c = centered.shape
    if n >= c:
        values, vectors = np.linalg.eigh(centered.T @ centered)
    else:  # the same directions from the smaller of both products
        values, vectors = np.linalg.eigh(centered @ centered.T)
        vectors = centered.T @ vectors
    basis = np.zeros((c, count))
    kept = [k for k in np.argsort(values)[::-1][:count] if values[k] > 1e-12 * values.max()]
    for column, k in enumerate(kept):
        direction = vectors[:, k] / np.linalg.norm(vectors[:, k])
        basis[:, column] = direction * np.sign(direction[np.argmax(np.abs(direction))])
    return basis


def _to_picture(
    unit: Float64[np.ndarray, "h w k"], size: int | tuple[int, int] | None, resample: Resample
) -> Image.Image:
    colors = np.broadcast_to(unit, (*unit.shape[:2], 3))
    picture = Image.fromarray(np.round(colors * 255).astype(np.uint8))
    return picture if size is None else picture.resize(pil_size(size), pil_filter(resample))
