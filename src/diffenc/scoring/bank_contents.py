"""A query bank's table of contents, every field of it checked."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffenc.errors import BackboneError, DiffencError
from diffenc.scoring.bank_files import (
    BANK_FILE,
    DTYPES,
    FORMAT,
    PLAN_FILE,
    BankContents,
    Shard,
    json_digest,
    shard_name,
)
from diffenc.scoring.config import ScorerConfig
from diffenc.storage.names import is_file, printable, reason
from diffenc.storage.reading import read_json

_MOST_BYTES = 2**30  # millions of names
_REFERENCES = {None: 0, "gray": 1, "neutral": 8}


def read_contents(folder: Path) -> BankContents:
    """The table of contents of a complete bank.

    Raises:
        BackboneError: There is none, or it is broken, contradicts itself or is of another format.
    """
    path = folder / BANK_FILE
    if not is_file(path):
        begun = is_file(folder / PLAN_FILE)
        raise BackboneError(
            f"there is no complete query bank in {folder}: {BANK_FILE} is missing; "
            + (
                "it was begun, and the same call of scorer.build_index or diffenc index goes on"
                if begun
                else "build one with scorer.build_index(images, folder) or diffenc index"
            )
        )
    values = read_json(path, error=BackboneError, most=_MOST_BYTES)
    if "format" in values and values["format"] != FORMAT:
        raise BackboneError(
            f"{path} has format {printable(values['format'], 40)}, this version reads {FORMAT}; "
            "build the bank again"
        )
    for key, (fits, what) in _FIELDS.items():
        if key not in values:
            raise _no_contents(path, f"it lacks {key!r}")
        if not fits(values[key]):
            raise _no_contents(path, f"{key} must be {what}, got {printable(values[key], 80)}")
    contents = _contents(values, path)
    _check_sums(contents, path)
    return contents


def check_unchanged(folder: Path, contents: BankContents) -> None:
    """Refuse a table of contents that is possible, but not the one that was written.

    Raises:
        BackboneError: It was edited.
    """
    if not contents.unchanged:
        raise _no_contents(
            folder / BANK_FILE, "it was changed after it was written; build the bank again"
        )


def _no_contents(path: Path, why: str) -> BackboneError:
    return BackboneError(f"{path} is no table of contents of a query bank: {why}")


def _contents(values: Mapping[str, Any], path: Path) -> BankContents:
    try:
        config = ScorerConfig.from_dict(values["config"])
    except (DiffencError, TypeError, ValueError) as error:
        raise _no_contents(path, f"its config is not allowed: {reason(error)}") from error
    written = {key: value for key, value in values.items() if key != "digest"}
    return BankContents(
        bank=values["bank"],
        backbone=values["backbone"],
        config=config,
        layers=tuple(values["layers"]),
        shapes=tuple((cells, channels) for cells, channels in values["shapes"]),
        size=(values["size"][0], values["size"][1]),
        dtype=values["dtype"],
        names=tuple(values["names"]),
        skipped=tuple((name, why) for name, why in values["skipped"]),
        references=values["references"],
        weights=values["weights"],
        shards=tuple(Shard(**shard) for shard in values["shards"]),
        unchanged=values["digest"] == json_digest(written),
    )


def _check_sums(contents: BankContents, path: Path) -> None:
    """Refuse what cannot be of one bank."""
    config, steps = contents.config, len(contents.config.steps)
    if config.mode != "shared-query":
        raise _no_contents(path, f"its config has mode {config.mode!r}")
    if len(set(contents.names)) < len(contents.names):
        raise _no_contents(path, "a name stands there twice")
    layers = len(contents.layers)
    counts = {layers, len(contents.shapes), len(contents.weights["norms"])}
    if len(set(contents.layers)) < layers or min(counts) < layers or len(contents.shapes) != layers:
        raise _no_contents(path, "layers, shapes and weights differ in number")
    kind = config.calibration
    digest = config.reference_digest or ""
    references = int(digest.split("-")[0]) if re.match(r"[0-9]{1,9}-", digest) else 0
    references = _REFERENCES.get(kind, references)
    if contents.references != references:
        raise _no_contents(
            path, f"calibration {kind!r} has {references} references, not {contents.references}"
        )
    rows = 0
    for index, shard in enumerate(contents.shards):
        if shard.file != shard_name(index) or shard.first != rows:
            raise _no_contents(
                path,
                f"shard {index} is {printable(shard.file, 80)} from row {shard.first} on, and must "
                f"be {shard_name(index)} from row {rows} on",
            )
        rows += shard.rows
    expected = (len(contents.names) + contents.references) * steps
    if rows != expected:
        raise _no_contents(
            path,
            f"its shards have {rows} rows, and {len(contents.names)} images and "
            f"{contents.references} references at {steps} steps have {expected}",
        )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32}", value) is not None


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_count(v, 1) for v in value)


def _list_of(fits: Callable[[object], bool], least: int = 0) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return isinstance(value, list) and len(value) >= least and all(map(fits, value))

    return check


def _is_skipped(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))


def _is_shard(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"file", "first", "rows", "digest"}
        and _is_text(value["file"])
        and _is_count(value["first"])
        and _is_count(value["rows"], 1)
        and _is_digest(value["digest"])
    )


def _is_mark(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"dtype", "digest", "norms"}
        and value["dtype"] in [*DTYPES]
        and _is_digest(value["digest"])
        and isinstance(value["norms"], list)
        and all(isinstance(norm, int | float) and norm >= 0 for norm in value["norms"])
    )


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "format": (_is_count, "a number"),
    "bank": (_is_digest, "a digest of 32 hexadecimal digits"),
    "backbone": (_is_text, "the name of a model"),
    "config": (lambda value: isinstance(value, dict), "the options of a scorer"),
    "layers": (_list_of(_is_text, 1), "a list of one or more layers' names"),
    "shapes": (_list_of(_is_pair, 1), "a list of pairs, cells and channels of each layer"),
    "size": (_is_pair, "height and width in pixels"),
    "dtype": (lambda value: value in [*DTYPES], f"one of {[*DTYPES]}"),
    "names": (_list_of(_is_text, 1), "a list of one or more texts"),
    "skipped": (_list_of(_is_skipped), "a list of pairs, name and reason"),
    "references": (_is_count, "a number"),
    "weights": (_is_mark, "dtype, digest and norms"),
    "digest": (_is_digest, "a digest of 32 hexadecimal digits"),
    "shards": (_list_of(_is_shard, 1), "a list of one or more shards: file, first, rows, digest"),
}
