"""The folder that a projector is saved to: a JSON config and safetensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffenc.errors import ConfigError, OutputError, ShapeError

_CONFIG_FILE, _WEIGHTS_FILE = "projector.json", "projector.safetensors"

_P = TypeVar("_P", bound="SavedProjector")


class SavedProjector(nn.Module):
    """Base of the projectors: writes itself to a folder, and is read from one.

    Attributes:
        options: Names of the attributes that it is made with again.
        in_features: Channels of a vision token, of each stream where there are two.
        out_features: Width of the language model.
        kind: See `Projector`.
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
        _write(
            Path(folder), {name: getattr(self, name) for name in self.options}, self.state_dict()
        )

    @classmethod
    def from_pretrained(cls: type[_P], folder: "str | os.PathLike[str]") -> _P:
        """Inverse of `save_pretrained`.

        Raises:
            ConfigError: The folder does not hold a whole projector.
            ShapeError: Its weights do not fit its config.
        """
        source = Path(folder)
        options, state = _read(source)
        try:
            projector = cls(**{name: _tuples(options.pop(name)) for name in cls.options}, **options)
        except (ValueError, TypeError, KeyError) as error:
            raise _not_whole(source, error) from error
        load_weights(projector, state, str(source))
        return projector


def load_weights(projector: SavedProjector, state: Mapping[str, Tensor], where: str) -> None:
    """Take weights that fit, or raise a `ShapeError` that tells both shapes."""
    has = {key: tuple(value.shape) for key, value in state.items()}
    wants = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    if has != wants:
        raise ShapeError(
            f"{where} holds {_told(has)}; this projector ({projector.kind}, "
            f"{projector.in_features} -> {projector.out_features}) has {_told(wants)}"
        )
    projector.load_state_dict(dict(state))


def _write(target: Path, options: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    weights = {key: value.detach().contiguous() for key, value in state.items()}
    try:
        target.mkdir(parents=True, exist_ok=True)
        partial = target / f"{_WEIGHTS_FILE}.partial"
        save_file(weights, partial, metadata={"format": "pt"})
        partial.replace(target / _WEIGHTS_FILE)
        partial = target / f"{_CONFIG_FILE}.partial"
        partial.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
        partial.replace(target / _CONFIG_FILE)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {target}: {error}") from error


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        options = json.loads((source / _CONFIG_FILE).read_text(encoding="utf-8"))
        return dict(options), load_file(source / _WEIGHTS_FILE)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise _not_whole(source, error) from error


def _not_whole(source: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{source} does not hold what save_pretrained of this class wrote ({_CONFIG_FILE} and "
        f"{_WEIGHTS_FILE}): {error}"
    )


def _tuples(value: Any) -> Any:
    """JSON knows lists alone."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _told(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key.removeprefix('layers.')} {shape}" for key, shape in shapes.items())
