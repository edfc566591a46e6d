"""Which files of a model's folder hold its weights, and the weights in them.

A folder may hold them in one file or in shards behind an index, in full precision or in half
(`.fp16.`), beside files that belong to something else. `choose_weights` answers once for everybody
who reads or downloads them.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from diffenc.errors import BackboneError, DiffencError
from diffenc.storage.names import StrPath, inside, is_file, is_folder, printable, reason
from diffenc.storage.reading import read_json

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""Names of the files of a library's models."""

HALF = "fp16"
"""The variant in half precision."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_VARIANT = re.compile(r"[A-Za-z0-9_-]+")


def check_variant(variant: object) -> str | None:
    """The name of a variant, if it is one.

    Raises:
        BackboneError: It is no text, or one that no file's name can hold.
    """
    if variant is None or variant == "":
        return None if variant is None else ""
    if not isinstance(variant, str) or not _VARIANT.fullmatch(variant):
        raise BackboneError(
            f"variant must be a word in the names of weight files, such as 'fp16', or '' for the "
            f"files without one; got {printable(repr(variant))}"
        )
    return variant


def choose_weights(
    names: Iterable[str],
    stem: str,
    *,
    variant: str | None = None,
    half: bool = False,
    where: str,
    error: type[DiffencError] = BackboneError,
) -> tuple[str, str]:
    """The file, or the index of the files, that holds a model's weights.

    Where one file and an index lie side by side, the library's own rule holds: diffusers takes the
    index, transformers the file.

    Args:
        names: Names of the files in the model's folder.
        stem: Stem of the library's file names, `DIFFUSERS` or `TRANSFORMERS`.
        variant: Word in the file names, such as "fp16"; "" for files without one. None takes the
            files without one; it takes those in half precision if there are no others or if `half`
            is set.
        half: Whether weights in half precision are enough.
        where: Name of the folder, for messages.
        error: Class of the exception that is raised.

    Returns:
        Name of the `.safetensors` file or of the JSON index, and the variant, "" for none.

    Raises:
        DiffencError: `error`: there is no such file.
    """
    present = set(names)
    order = [variant] if variant is not None else [HALF, ""] if half else ["", HALF]
    for each in order:
        if chosen := _file_of(present, stem, each):
            return chosen, each
    raise error(_why_none(present, stem, variant, where))


def variants(names: Iterable[str], stem: str) -> list[str]:
    """Variants among the names of files, "" for those without one."""
    present = set(names)
    words = {part for name in present for part in re.split(r"[.]", name)[1:]}
    words |= {word.partition("-")[0] for word in words}
    known = {word for word in words if _VARIANT.fullmatch(word)} | {""}
    return sorted(word for word in known if _file_of(present, stem, word))


def shard_names(index: StrPath, *, error: type[DiffencError] = BackboneError) -> dict[str, str]:
    """File of each weight, as an index names it: relative to the index and in its folder.

    Links that lie in the folder are followed wherever they lead, since the Hub's cache is made of
    them; a name that itself leads out of the folder is refused.

    Raises:
        DiffencError: `error`: the index is broken, or names a file outside its folder or one that
            is no `.safetensors`.
    """
    path = Path(index)
    weights = read_json(path, error=error).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise error(f"{path} is no index of weights: it lacks a weight_map")
    for file in {repr(name): name for name in weights.values()}.values():
        inside(path.parent, file, error=error)
        if not file.endswith(".safetensors"):
            raise error(f"{path} names {file!r}; only .safetensors files are read")
    return weights


def list_folder(folder: StrPath, *, error: type[DiffencError] = BackboneError) -> list[str]:
    """Names of the files in a folder.

    Raises:
        DiffencError: `error`: it is missing or cannot be read.
    """
    try:
        return sorted(entry.name for entry in Path(folder).iterdir() if entry.is_file())
    except (OSError, ValueError) as failure:
        raise error(f"cannot load {printable(folder)}: {reason(failure)}") from failure


class StoredWeights(Mapping[str, Tensor]):
    """Weights in files, by name; a weight is read when it is asked for, on the CPU.

    Args:
        files: Names of the weights that each file must hold; None for all that it holds.
        where: Name of the folder or file, for messages.
        error: Class of the exception that is raised.

    Raises:
        DiffencError: `error`: a file is missing, broken, cut off, or does not hold what it should.
    """

    def __init__(
        self,
        files: Mapping[Path, Collection[str] | None],
        *,
        where: str,
        error: type[DiffencError] = BackboneError,
    ) -> None:
        self.where, self._error = where, error
        self._handles: dict[Path, Any] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for path, expected in files.items():
            held = set(self._open(path).keys())
            if expected is not None and held != set(expected):
                odd = sorted(held.symmetric_difference(expected))
                raise error(
                    f"cannot load {where}: {path.name} and the index disagree on {len(odd)} "
                    f"weights, such as {odd[0]!r}"
                )
            self._places.update({name: (path, name) for name in held})

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._places[name]
        try:
            tensor: Tensor = self._open(path).get_tensor(stored)
        except Exception as failure:  # safetensors raises errors of its own
            raise self._error(f"cannot load {path}: {reason(failure)}") from failure
        return tensor

    def __contains__(self, name: object) -> bool:  # the one of `Mapping` reads the weight
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, each once."""
        return tuple(self._handles)

    def first(self, name: str, count: int = 64) -> Tensor:
        """The first numbers of a weight, without reading all of it."""
        path, stored = self._places[name]
        rows = self._open(path).get_slice(stored)
        with torch.device("cpu"):  # safetensors puts parts on the default device
            start: Tensor = rows[:count] if len(rows.get_shape()) == 1 else rows[:1]
        return start.flatten()[:count]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, without reading it."""
        path, stored = self._places[name]
        return tuple(self._open(path).get_slice(stored).get_shape())

    def dtype(self, name: str) -> str:
        """Format of a weight's numbers, such as "F16" or "I64", without reading it."""
        path, stored = self._places[name]
        dtype: str = self._open(path).get_slice(stored).get_dtype()
        return dtype

    def renamed(self, names: Mapping[str, str]) -> "StoredWeights":
        """Get some of the weights under other names.

        Args:
            names: Present name of each weight, by its new name.
        """
        view = StoredWeights({}, where=self.where, error=self._error)
        view._handles = self._handles
        view._places = {new: self._places[own] for new, own in names.items()}
        return view

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except Exception as failure:  # safetensors raises errors of its own
                raise self._error(f"cannot load {path}: {reason(failure)}") from failure
        return self._handles[path]


def open_weights(
    folder: StrPath,
    stem: str,
    *,
    variant: str | None = None,
    half: bool = False,
    error: type[DiffencError] = BackboneError,
) -> tuple[StoredWeights, str]:
    """The weights of a model's folder, and the variant that they are, "" for none.

    Args:
        folder: Folder of the model.
        stem: Stem of the library's file names, `DIFFUSERS` or `TRANSFORMERS`.
        variant: Variant of the weights, see `choose_weights`.
        half: Whether weights in half precision are enough.
        error: Class of the exception that is raised.

    Raises:
        DiffencError: `error`: there are none, or they are broken.
    """
    source, names = Path(folder), list_folder(folder, error=error)
    chosen, taken = choose_weights(
        names, stem, variant=variant, half=half, where=str(folder), error=error
    )
    weights = _opened(source, chosen, error)
    if variant is None and taken == HALF:
        _check_same(weights, source, names, stem, error)
    return weights, taken


def check_finite(
    value: Tensor, name: str, where: str, *, error: type[DiffencError] = BackboneError
) -> None:
    """Raise where a weight holds NaN or infinity.

    Args:
        value: Weight in the type that it is used in.
        name: Name of the weight, for messages.
        where: Name of the file or model that the weight is from, for messages.
        error: Class of the exception that is raised.

    Raises:
        DiffencError: `error`: it does.
    """
    if not value.is_floating_point() or value.numel() == 0 or value.is_meta:
        return
    # The extremes are NaN where any number is; ten times faster than `isfinite`, without a copy.
    if not all(isfinite(extreme.item()) for extreme in value.detach().aminmax()):
        raise error(
            f"{where} holds NaN or infinity in {name!r} as {value.dtype}; the file is broken, or "
            "its weights need another dtype"
        )


def _opened(folder: Path, chosen: str, error: type[DiffencError]) -> StoredWeights:
    if chosen.endswith(".safetensors"):
        return StoredWeights({folder / chosen: None}, where=str(folder), error=error)
    expected: dict[Path, list[str]] = {}
    for weight, file in shard_names(folder / chosen, error=error).items():
        expected.setdefault(inside(folder, file, error=error), []).append(weight)
    if absent := [path.name for path in expected if not is_file(path)]:
        raise error(
            f"cannot load {folder}: {chosen} names {len(absent)} files that are not there, such as "
            f"{absent[0]!r}"
        )
    return StoredWeights(expected, where=str(folder), error=error)


def _check_same(
    half: StoredWeights,
    folder: Path,
    names: Collection[str],
    stem: str,
    error: type[DiffencError],
) -> None:
    """Raise where the files in full precision beside those in half plainly hold other weights.

    One of the two would be a leftover, and which of them is not ours to guess. Names, shapes and
    the first numbers of all weights are compared, which reads next to nothing.
    """
    if not _file_of(set(names), stem, ""):
        return
    full = _opened(folder, choose_weights(names, stem, variant="", where="", error=error)[0], error)
    same = half.keys() == full.keys() and all(_alike(half, full, name) for name in half)
    if not same:
        raise error(
            f"{folder} holds other weights in half precision than in full: "
            f"{', '.join(sorted(path.name for path in (*half.files, *full.files)))}. Name the ones "
            f"that you mean: variant={HALF!r} or variant='', or remove the others"
        )


def _alike(half: StoredWeights, full: StoredWeights, name: str) -> bool:
    if half.shape(name) != full.shape(name):
        return False
    one, other = (weights.first(name).float() for weights in (half, full))
    return bool(((one - other).abs() <= 1e-6 + 1e-2 * other.abs()).all())


def _file_of(names: Collection[str], stem: str, variant: str) -> str | None:
    """The file or index of a variant."""
    single = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    indexes = (
        [  # libraries and their versions put the word in different places
            f"{stem}.safetensors.index.{variant}.json",
            f"{stem}.{variant}.safetensors.index.json",
            f"{stem}.safetensors.{variant}.index.json",
        ]
        if variant
        else [f"{stem}.safetensors.index.json"]
    )
    order = [*indexes, single] if stem == DIFFUSERS else [single, *indexes]
    return next((name for name in order if name in names), None)


def _why_none(names: Collection[str], stem: str, variant: str | None, where: str) -> str:
    expected = f"{stem}{f'.{variant}' if variant else ''}.safetensors"
    others = [word for word in variants(names, stem) if word != variant]
    if others:
        listed = ", ".join(repr(word) for word in others)
        return f"cannot load {where}: it lacks {expected}; it has variant={listed}"
    pickled = sorted(name for name in names if name.endswith(_PICKLED))
    if pickled:
        return (
            f"cannot load {where}: it holds {pickled[0]}, a format that can run code when it is "
            f"opened, and no {expected}. Convert it: load the model where you trust it, with the "
            "library that wrote it, and write it with its save_pretrained(folder), which makes "
            ".safetensors"
        )
    if any(name.startswith(f"{stem}-") for name in names):
        return f"cannot load {where}: it holds shards and lacks their {stem}.safetensors.index.json"
    return f"cannot load {where}: it lacks {expected}"


def weight_bytes(folder: StrPath, stem: str) -> int:
    """Size in bytes of the files that hold the weights of a folder; 0 where there are none."""
    if not is_folder(folder):
        return 0
    try:
        weights, _ = open_weights(folder, stem)
    except DiffencError:
        return 0
    return sum(path.stat().st_size for path in weights.files)
