"""Which picture, in which order, a host shows to its tower: asked of the host itself.

Forks put tiles together in their own ways: picture by picture, all tiles first and all whole views
last, resized, repeated. So the host's own code is run once on pictures that are blank but for the
number of their sample, up to its first call of the tower, which reads the numbers.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffenc.errors import PromptError
from diffenc.hosts.first_call import recording_first_call

_BASE = 100  # exact in bfloat16, with room for a host that rounds


def owners_of_rows(
    splice: Callable[..., Any],
    call: inspect.BoundArguments,
    owners: Sequence[int],
    *,
    per_tower: bool = False,
) -> list[int | None]:
    """The sample of each picture that a host shows to its tower in one call.

    Generators of random numbers are left as they were, so that a host that draws an order draws the
    same one again.

    Args:
        splice: The host's `prepare_inputs_labels_for_multimodal`.
        call: Arguments of the call, which are not changed.
        owners: Sample of each entry of the argument `images`.
        per_tower: Whether `images` is a list of batches, one for each of the host's towers, whose
            rows the owners are of.

    Returns:
        A sample for each row that the tower is shown; None for a blank picture that the host adds.

    Raises:
        PromptError: The host calls no tower, changes what the pictures hold, or fails on them.
    """
    numbered = inspect.BoundArguments(call.signature, type(call.arguments)(call.arguments))
    for name, value in numbered.arguments.items():
        if isinstance(value, Tensor):  # hosts change some in place
            numbered.arguments[name] = value.clone()
    images = call.arguments["images"]
    numbered.arguments["images"] = (
        [_numbered(batch, owners) for batch in images] if per_tower else _numbered(images, owners)
    )
    with torch.no_grad(), _same_draws(), recording_first_call() as first:
        try:
            first.run(lambda: splice(*numbered.args, **numbered.kwargs))
        except Exception as error:
            raise PromptError(
                "it is not known which prompt belongs to which picture: the host's own "
                f"preparation of pictures fails on numbered ones: {error}"
            ) from error
    if first.shown is None:
        raise PromptError(
            "prompts were given for several samples, and the host prepares its pictures without "
            "calling the tower, so no prompt would be read"
        )
    numbers = read_numbers(first.shown)
    last = max(owners) + 1
    strange = [row for row, number in enumerate(numbers) if number is None or number > last]
    if strange:
        raise PromptError(
            f"it is not known which prompt belongs to which picture: the host changes pictures "
            f"before the tower sees them, so that row {strange[0]} of {len(numbers)} is of no "
            "sample or of several; show samples with different prompts one by one, or pass a "
            "prompt for each picture: prompt_scope(prompts, per='image')"
        )
    return [None if not number else number - 1 for number in numbers]


@contextmanager
def _same_draws() -> Iterator[None]:
    """A block after which every generator goes on as if it had not been there."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    of_python = random.getstate()
    of_numpy = np.random.get_state()  # noqa: NPY002  # the global one, which hosts draw from
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


def _numbered(images: Any, owners: Sequence[int]) -> Any:
    """Pictures of the same form, filled with the number of their sample, counted from 1."""
    filled = [_filled(image, owner + 1) for image, owner in zip(images, owners, strict=True)]
    return torch.stack(filled) if isinstance(images, Tensor) else type(images)(filled)


def _filled(image: Any, number: int) -> Any:
    if not isinstance(image, Tensor):
        return type(image)(_filled(each, number) for each in image)
    blank = torch.zeros_like(image)
    blank[..., 0, :, :] = number % _BASE
    blank[..., 1, :, :] = number // _BASE
    return blank


def read_numbers(pictures: Tensor) -> list[int | None]:
    """Numbers of pictures (n 3 height width) that hold one each; None where one does not."""
    flat = pictures.flatten(2)
    low, high = flat.amin(dim=2), flat.amax(dim=2)
    value = ((low + high) / 2).round()
    close = ((high - value).abs().amax(1) < 0.3) & ((low - value).abs().amax(1) < 0.3)
    valid = close & (value[:, 2] == 0) & (value >= 0).all(dim=1)
    numbers = (value[:, 0] + _BASE * value[:, 1]).tolist()
    return [int(n) if ok else None for n, ok in zip(numbers, valid.tolist(), strict=True)]
