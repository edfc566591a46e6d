"""The folder that a projector is saved to: a JSON config and safetensors."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from diffenc.errors import ConfigError, OutputError, ShapeError
from diffenc.runtime.inference import lasting
from diffenc.storage.names import checked_path, reason
from diffenc.storage.reading import read_json
from diffenc.storage.schema import check_present, make
from diffenc.storage.tensors import misfits, read_tensors, write_tensors
from diffenc.storage.writing import begin_folder, write_json

_CONFIG_FILE, _WEIGHTS_FILE = "projector.json", "projector.safetensors"

_P = TypeVar("_P", bound="SavedProjector")


class SavedProjector(nn.Module):
    """Base of the projectors: writes itself to a folder, and is read from one.

    Attributes:
        options: Names of the attributes that the projector is made again from.
        in_features: Number of channels of a vision token, or of each stream where there are two.
        out_features: Width of the language model.
        kind: Kind of the layers, see `Projector`.
    """

    options: ClassVar[tuple[str, ...]]
    in_features: Any
    out_features: int
    kind: str

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write `projector.json` and `projector.safetensors`.

        Raises:
            OutputError: The folder cannot be written.
        """
        target = begin_folder(checked_path("a projector", folder, error=OutputError), _CONFIG_FILE)
        write_tensors(target / _WEIGHTS_FILE, self.state_dict())
        write_json(target / _CONFIG_FILE, {name: getattr(self, name) for name in self.options})

    @classmethod
    @lasting
    def from_pretrained(cls: type[_P], folder: "str | os.PathLike[str]") -> _P:
        """Inverse of `save_pretrained`.

        Raises:
            ConfigError: The folder does not hold a whole projector.
            ShapeError: Its weights do not fit its config.
        """
        source = checked_path("a projector", folder)
        try:
            options = read_json(source / _CONFIG_FILE)
            check_present(options, cls.options)
            state = read_tensors(source / _WEIGHTS_FILE, finite=True)
            # Without memory at first: a config may ask for any amount of it.
            with torch.device("meta"):
                shaped: _P = make(cls, options)
        except Exception as error:  # torch raises three kinds of errors for sizes beyond its own
            raise ConfigError(
                f"{source} does not hold what save_pretrained of this class wrote ({_CONFIG_FILE} "
                f"and {_WEIGHTS_FILE}): {reason(error)}"
            ) from error
        _require_fitting(shaped, state, str(source))
        projector: _P = make(cls, options)
        load_weights(projector, state, str(source))
        return projector


def load_weights(projector: SavedProjector, state: Mapping[str, Tensor], where: str) -> None:
    """Take weights that fit.

    Raises:
        ShapeError: Names, shapes or kinds of numbers differ; the message tells both shapes.
    """
    _require_fitting(projector, state, where)
    projector.load_state_dict(dict(state))


def _require_fitting(projector: SavedProjector, state: Mapping[str, Tensor], where: str) -> None:
    wrong = misfits(state, own := projector.state_dict())
    if not wrong:
        return
    has, wants = ({key: tuple(value.shape) for key, value in each.items()} for each in (state, own))
    if has == wants:
        raise ShapeError(f"{where} holds {state[wrong[0]].dtype} in {wrong[0]}; weights are floats")
    raise ShapeError(
        f"{where} holds {_told(has)}; this projector ({projector.kind}, "
        f"{projector.in_features} -> {projector.out_features}) has {_told(wants)}"
    )


def _told(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key.removeprefix('layers.')} {shape}" for key, shape in shapes.items())
