"""What a folder of features is made from: written first, and compared when a run goes on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from diffenc._version import __version__
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import OutputError
from diffenc.extraction.extractor import Extractor
from diffenc.extraction.index import INDEX_FILE
from diffenc.extraction.listing import Listing
from diffenc.extraction.shards import shard_paths
from diffenc.memory.digests import adapters_in_use, is_alike
from diffenc.storage.names import exists, is_file, is_folder, printable
from diffenc.storage.reading import parse_json, read_json
from diffenc.storage.writing import remove_file, reporting, write_json

PLAN_FILE = "features.json"
SKIPPED_FILE = "skipped.jsonl"

_FORMAT = 1
_NAMES = {
    "format": "the layout of the folder",
    "version": "the version of diffenc",
    "model": "the model",
    "mark": "the weights of the model",
    "trained": "the weights that were trained on top of the model",
    "dtype": "the dtype",
    "prompt": "the prompt",
    "pictures": "the number of pictures",
    "listing": "the names, the order or the texts of the pictures",
    "samples": "the pictures of these names",
    "shard_size": "the number of pictures per shard",
    "taps": "the taps",
    "tensors": "the shapes of the features",
}
_EFFECTS = {
    "model": ("mark", "trained", "taps", "tensors"),
    "dtype": ("tensors", "mark"),
    "pictures": ("listing", "samples"),
    "listing": ("samples",),
    "taps": ("tensors",),
    **dict.fromkeys(("size", "conditioning", "timestep", "grid"), ("tensors",)),
    **dict.fromkeys(("maps", "tokens", "word_tokens", "pool", "output_dtype"), ("tensors",)),
}
"""What changes with something else, and is not told beside it."""


def make_plan(
    extractor: Extractor, listing: Listing, *, shard_size: int, trained: str
) -> dict[str, Any]:
    """What decides the features of a run, as JSON holds it.

    Args:
        extractor: Recipe of the features.
        listing: Pictures of the run.
        shard_size: Number of pictures per shard.
        trained: Digest of the adapters and the captioner of the encoder.
    """
    encoder, shapes = extractor.encoder, extractor.row_shapes
    tensors = None
    if shapes is not None:
        tensors = {
            name: {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
            for name, (shape, dtype) in shapes.items()
        }
    plan = {
        "format": _FORMAT,
        "version": __version__,
        "model": encoder.backbone.name,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "prompt": extractor.prompt,
        "config": encoder.config.to_dict(),
        "taps": [asdict(tap) for tap in encoder.feature_info],
        "kept": asdict(extractor.kept),
        "tensors": tensors,
        "source": listing.source,
        "pictures": len(listing),
        "listing": listing.digest(),
        "samples": listing.samples(),
        "shard_size": shard_size,
        "trained": trained,
        "mark": encoder.backbone.mark(),
    }
    made: dict[str, Any] = parse_json(json.dumps(plan), where="the plan")  # as it is read again
    return made


def trained_digest(encoder: DiffusionEncoder) -> str:
    """A digest of LoRA and captioner, which the mark of a backbone passes over; "" without any."""
    adapters = adapters_in_use(encoder)
    digest, any_ = hashlib.blake2b(adapters.encode(), digest_size=16), bool(adapters)
    for name, value in sorted(encoder.named_parameters()):
        if "lora_" in name or name.startswith("captioner."):
            any_ = True
            digest.update(name.encode())
            digest.update(_bytes(value))
    return digest.hexdigest() if any_ else ""


def _bytes(value: Tensor) -> bytes:
    content: bytes = value.detach().cpu().float().numpy().tobytes()
    return content


def run_digest(plan: Mapping[str, Any]) -> str:
    """A short name for a run, which all its shards bear."""
    text = json.dumps(plan, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def begin(folder: Path, plan: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any]:
    """Write the plan of a run, unless the folder holds the same one, begun before.

    Returns:
        The plan that the run goes on with.

    Raises:
        OutputError: The folder holds something else, a complete run, or one of another plan, and is
            not to be overwritten; or it cannot be written.
    """
    check_folder(folder, overwrite=overwrite)
    if is_file(folder / PLAN_FILE) and not overwrite:
        begun: dict[str, Any] = read_json(folder / PLAN_FILE, error=OutputError)
        if differing := differences(begun, plan):
            raise OutputError(
                f"{printable(folder)} was begun in another way: {'; '.join(differing)}. Give the "
                "same options, name another folder, or begin anew with --force (overwrite=True)"
            )
        _remove_partial(folder)
        return begun
    clear(folder)
    write_json(folder / PLAN_FILE, plan)
    return dict(plan)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Find out, before a model is loaded, whether a run may write to a folder.

    Raises:
        OutputError: It may not.
    """
    if exists(folder) and not is_folder(folder):
        raise OutputError(f"the folder of the features exists and is a file: {printable(folder)}")
    if not is_folder(folder):
        return
    if is_file(folder / INDEX_FILE) and not overwrite:
        raise OutputError(
            f"{printable(folder)} holds complete features; name another folder, or begin anew with "
            "--force (overwrite=True)"
        )
    with reporting(folder):
        names = {path.name for path in folder.iterdir()}
    own = {path.name for path in shard_paths(folder)} | {PLAN_FILE, INDEX_FILE, SKIPPED_FILE}
    strange = sorted(name for name in names - own if not name.startswith("."))
    if strange and PLAN_FILE not in names:
        raise OutputError(
            f"{printable(folder)} holds other files, such as {printable(strange[0])}; name a new "
            "folder or an empty one"
        )


def clear(folder: Path) -> None:
    """Remove the features of a folder, the index first.

    Raises:
        OutputError: A file cannot be removed.
    """
    for name in (INDEX_FILE, PLAN_FILE, SKIPPED_FILE):
        remove_file(folder / name)
    for path in list(shard_paths(folder)):
        remove_file(path)
    _remove_partial(folder)


def _remove_partial(folder: Path) -> None:
    """Remove what a program that was killed had begun to write."""
    for path in folder.glob(".*.partial.*"):
        remove_file(path)


def differences(begun: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """In what two plans differ, in words; what follows from other differences is left out."""
    lines: dict[str, str] = {}
    for name in (*_NAMES, "config", "kept"):
        before, now = begun.get(name), plan.get(name)
        if name in ("config", "kept"):
            lines |= _option_differences(before or {}, now or {})
        elif name == "mark":
            if not _same_marks(before, now):
                lines[name] = f"{_NAMES[name]} are others"
        elif name == "samples":
            if _are_others(before, now):
                lines[name] = f"{_NAMES[name]} are others, by what a few of their files hold"
        elif before != now:
            changed = name in ("listing", "trained", "taps", "tensors")
            was = f"was {_shown(before)} and is {_shown(now)}"
            lines[name] = f"{_NAMES[name]} {'are others' if changed else was}"
    for cause, effects in _EFFECTS.items():
        if cause in lines:
            lines = {name: line for name, line in lines.items() if name not in effects}
    return list(lines.values())


def _option_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{name} was {_shown(before.get(name))} and is {_shown(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }


def _are_others(before: Any, now: Any) -> bool:
    """Whether most samples differ: some pictures may have been mended, or be there since."""
    if not isinstance(before, list) or not isinstance(now, list) or len(before) != len(now):
        return False
    changed: int = sum(one != other for one, other in zip(before, now, strict=True))
    return changed > max(1, len(now) // 2)


def _same_marks(before: Any, now: Any) -> bool:
    if not isinstance(before, dict) or not isinstance(now, dict) or before.keys() != now.keys():
        return False
    return all(is_alike(now[name], numbers) for name, numbers in before.items())


def _shown(value: object) -> str:
    return printable("none" if value is None else repr(value), 80)
