"""Which picture, in which order, a host shows to its tower: asked of the host itself.

Forks put tiles together in their own ways: picture by picture, all tiles first and all whole views
last, resized, repeated. So the host's own code is run once on pictures that are blank but for the
number of their sample, up to its first call of the tower, which reads the numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffenc.errors import PromptError
from diffenc.hosts.asking import read_numbered, recording_first_call

_BASE = 100  # exact in bfloat16, with room for a host that rounds


def owners_of_rows(
    splice: Callable[..., Any], arguments: Mapping[str, Any], owners: Sequence[int]
) -> list[int | None]:
    """The sample of each picture that a host shows to its tower in one call.

    Args:
        splice: The host's `prepare_inputs_labels_for_multimodal`, bound to its model.
        arguments: Arguments of the call, by name; "self" is left out. They are not changed.
        owners: Sample of each entry of ``arguments["images"]``.

    Returns:
        A sample for each row that the tower is shown; None for a blank picture that the host adds.

    Raises:
        PromptError: The host calls no tower, changes what the pictures hold, or fails on them.
    """
    numbered = {name: _copied(value) for name, value in arguments.items() if name != "self"}
    numbered["images"] = _numbered(arguments["images"], owners)
    with torch.no_grad(), recording_first_call() as call:
        try:
            call.run(lambda: splice(**numbered))
        except Exception as error:
            raise PromptError(
                "it is not known which prompt belongs to which picture: the host's own "
                f"preparation of pictures fails on numbered ones: {error}"
            ) from error
    if call.shown is None:
        raise PromptError(
            "prompts were given for several samples, and the host prepares its pictures without "
            "calling the tower, so no prompt would be read"
        )
    rows = read_numbered(call.shown, _BASE)
    strange = [row for row, number in enumerate(rows) if number is None or number > max(owners) + 1]
    if strange:
        raise PromptError(
            f"it is not known which prompt belongs to which picture: the host changes pictures "
            f"before the tower sees them, so that row {strange[0]} of {len(rows)} is of no sample "
            "or of several; show samples with different prompts one by one, or pass a prompt for "
            "each picture: prompt_scope(prompts, per='image')"
        )
    return [None if number == 0 else number - 1 for number in rows if number is not None]


def _copied(value: Any) -> Any:
    """A copy for a host that changes its arguments in place."""
    return value.clone() if isinstance(value, Tensor) else value


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
