"""Tensors in files: safetensors, and pickles of weights alone."""

import zipfile
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from diffenc.errors import ConfigError, DiffencError
from diffenc.storage.names import StrPath, is_file, printable, reason
from diffenc.storage.writing import writing


def read_tensors(
    path: StrPath,
    *,
    error: type[DiffencError] = ConfigError,
    finite: bool = False,
    only: Callable[[str], object] | None = None,
) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Args:
        path: File to read.
        error: Class of the exception that is raised.
        finite: Whether NaN and infinity raise an error.
        only: Function that says by its name whether a tensor is read; None reads all tensors.

    Raises:
        DiffencError: `error`: the file is missing, cut off or no safetensors file, or holds values
            that are not finite.
    """

    def read(opened: Any) -> dict[str, Tensor]:
        names = [name for name in opened.keys() if only is None or only(name)]  # noqa: SIM118
        return {name: opened.get_tensor(name) for name in names}

    tensors: dict[str, Tensor] = _opened(path, read, error)
    if finite:
        check_finite(tensors, str(path), error=error)
    return tensors


def tensor_names(path: StrPath, *, error: type[DiffencError] = ConfigError) -> list[str]:
    """Names of the tensors in a safetensors file; see `read_tensors`."""
    return list(_opened(path, lambda opened: opened.keys(), error))


def read_metadata(path: StrPath, *, error: type[DiffencError] = ConfigError) -> dict[str, str]:
    """Texts in the header of a safetensors file; see `read_tensors`."""
    return dict(_opened(path, lambda opened: opened.metadata(), error) or {})


def open_tensors(path: StrPath, *, error: type[DiffencError] = ConfigError) -> Any:
    """A safetensors file that stays open, for rows of large tensors; see `read_tensors`.

    Returns:
        What safetensors gives: `keys`, `get_slice(name)[rows]`, `get_tensor(name)`, `metadata`.
    """
    from safetensors import safe_open

    _require_file(path, error)
    try:
        return safe_open(path, framework="pt")
    except Exception as failure:  # safetensors raises errors of its own
        raise error(f"cannot read {printable(path)}: {reason(failure)}") from failure


def read_pickled(
    path: StrPath,
    *,
    error: type[DiffencError] = ConfigError,
    finite: bool = False,
    only: Callable[[str], object] | None = None,
) -> dict[str, Tensor]:
    """Tensors that `torch.save` wrote, on the CPU; nothing else in the file is opened.

    Args:
        path: File to read.
        error: Class of the exception that is raised.
        finite: Whether NaN and infinity raise an error.
        only: Function that says by its name whether a tensor is read; None reads all tensors.

    Raises:
        DiffencError: `error`: the file is missing or broken, holds more than weights, or holds
            values that are not finite.
    """
    _require_file(path, error)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                    raise error(f"cannot read {printable(path)}: torch.save compresses nothing")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except DiffencError:
        raise
    except UnpicklingError as failure:
        raise error(
            f"cannot read the weights in {printable(path)}: the file is broken or holds more than "
            "weights, and is not opened"
        ) from failure
    except Exception as failure:  # a broken pickle raises whatever it likes
        raise error(f"cannot read the weights in {printable(path)}: {reason(failure)}") from failure
    if not isinstance(content, Mapping):
        raise error(f"{path} holds no weights by name, but {type(content).__name__}")
    names = [name for name in content if isinstance(name, str) and (only is None or only(name))]
    tensors = {name: content[name] for name in names}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise error(f"{path}: {printable(name)} is no plain tensor")
    if finite:
        check_finite(tensors, str(path), error=error)
    return tensors


def write_tensors(
    path: StrPath, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as a safetensors file, whole or not at all.

    Args:
        path: File to write.
        tensors: Tensors by name; they are copied if they share memory.
        metadata: Texts for the file's header; several are written in random order. None says that
            the tensors are torch's.

    Raises:
        OutputError: It cannot be written.
    """
    from safetensors.torch import save_file

    with writing(path) as partial:
        apart: dict[str, Tensor] = {}
        places: set[int] = set()
        for name, tensor in tensors.items():
            value = tensor.detach().contiguous()
            apart[name] = value.clone() if value.untyped_storage().data_ptr() in places else value
            places.add(value.untyped_storage().data_ptr())
        save_file(apart, partial, metadata=dict(metadata or {"format": "pt"}))


def read_state(path: StrPath, *, error: type[DiffencError] = ConfigError) -> Any:
    """What `write_state` wrote: tensors on the CPU that are read from the file when they are used.

    Raises:
        DiffencError: `error`: the file is missing or broken, or holds more than weights and plain
            values.
    """
    _require_file(path, error)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as failure:  # a broken pickle raises whatever it likes
        raise error(f"cannot read {printable(path)}: {reason(failure)}") from failure


def write_state(path: StrPath, state: Any) -> None:
    """Write tensors among plain values, such as the state of an optimizer, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    with writing(path) as partial:
        torch.save(state, partial)


def check_finite(
    tensors: Mapping[str, Tensor], where: str, *, error: type[DiffencError] = ConfigError
) -> None:
    """Refuse NaN and infinity.

    Raises:
        DiffencError: `error`: there is some.
    """
    for name, tensor in tensors.items():
        # The floats of a byte and less have no test of their own.
        values = tensor.float() if tensor.is_floating_point() and tensor.itemsize < 2 else tensor
        if not bool(values.isfinite().all()):
            raise error(f"{where}: {printable(name)} holds NaN or infinity; the file is broken")


def misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Names in one of two sets of weights alone; or else those of another shape or kind of number.

    Floating point types of other precision are alike.
    """
    return sorted(own.keys() ^ state.keys()) or [
        name
        for name, value in own.items()
        if value.shape != state[name].shape
        or value.is_floating_point() != state[name].is_floating_point()
        or value.is_complex() != state[name].is_complex()
    ]


def _opened(path: StrPath, read: Callable[[Any], Any], error: type[DiffencError]) -> Any:
    from safetensors import safe_open

    _require_file(path, error)
    try:
        with safe_open(path, framework="pt") as opened:
            return read(opened)
    except Exception as failure:  # safetensors raises errors of its own, and KeyError for dtypes
        raise error(f"cannot read {printable(path)}: {reason(failure)}") from failure


def _require_file(path: StrPath, error: type[DiffencError]) -> None:
    if not is_file(path):  # a pipe would stop the program for good
        raise error(f"cannot read {printable(path)}: there is no such file")
