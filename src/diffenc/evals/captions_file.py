"""Captions of another run, or of another captioner, as prompts of the encoder."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from diffenc.errors import ConfigError
from diffenc.evals.items import Benchmark, Problem
from diffenc.evals.records import ANSWERS
from diffenc.storage.lines import parse_json_lines
from diffenc.storage.names import printable
from diffenc.storage.reading import DATA_BYTES, decode, parse_json, read_bytes
from diffenc.storage.schema import checked

_Data = TypeVar("_Data", bound=Benchmark[Any])
_PASS = "pass "
_REVIEW = "review of "
_FORMS = (
    "captions are read from the answers of one model that diffenc evaluate wrote (.jsonl), from "
    'JSON {"id": "caption"}, or from COCO\'s [{"image_id": 1, "caption": "..."}]'
)


def read_captions(path: "str | os.PathLike[str]") -> dict[str, str]:
    """Captions by id of the item.

    Args:
        path: Path of the answers that `diffenc evaluate captions` wrote, or another command with
            ``--question``, of which the last pass is taken; of a JSON file with captions by id; or
            of one in the format of COCO's results.

    Raises:
        ConfigError: The file cannot be read, is of another form, has two captions of an item, or
            answers of several models or kinds.

    Examples:
        >>> (folder / "captions.json").write_text('{"7": "a red circle"}')
        21
        >>> read_captions(folder / "captions.json")
        {'7': 'a red circle'}
    """
    where = printable(path)
    text = decode(read_bytes(path, error=ConfigError, most=DATA_BYTES), where=where)
    first = text.lstrip()[:1]
    lines = text.lstrip().split("\n", 1)[0]
    if first == "[":
        return _of_results(parse_json(text, list, where=where), where)
    if first != "{":
        raise ConfigError(f"{where} holds no captions: {_FORMS}")
    if '"type"' in lines and f'"{ANSWERS.header}"' in lines:
        return _of_answers(text, where)
    captions = parse_json(text, where=where)
    for name, caption in captions.items():
        checked(caption, str, f"{where}: the caption of {printable(name)}")
    return {name: caption.strip() for name, caption in captions.items()}


def with_captions(
    benchmark: _Data, captions: Mapping[str, str], *, where: str, part: bool
) -> _Data:
    """A benchmark with the items that have a caption; the others are problems of it.

    Args:
        benchmark: Benchmark whose questions are asked.
        captions: Captions by id of the item.
        where: Name of the file that they come from.
        part: Whether only a part of the benchmark is asked, so that there may be captions of more.

    Raises:
        ConfigError: There are captions of items that the benchmark has not.
    """
    known = {item.id for item in benchmark.items}
    foreign = [name for name in captions if name not in known]
    if foreign and not part:
        raise ConfigError(
            f"{where} has captions of {len(foreign)} items that {benchmark.source} has not, such "
            f"as {printable(foreign[0])}: pass the captions of this data"
        )
    without = [item.id for item in benchmark.items if item.id not in captions]
    problems = [Problem(f"items without a caption in {where}", f"id {name}") for name in without]
    items = tuple(item for item in benchmark.items if item.id in captions)
    return replace(benchmark, items=items, problems=(*benchmark.problems, *problems))


def _of_results(results: Sequence[Any], where: str) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, result in enumerate(results):
        place = f"{where}, entry {number}"
        if not isinstance(result, Mapping) or not {"image_id", "caption"} <= result.keys():
            raise ConfigError(f"{place} has no image_id and caption; {_FORMS}")
        name = str(checked(result["image_id"], int | str, f"{place}: image_id"))
        if name in captions:
            raise ConfigError(f"{place} is a second caption of {printable(name)}; leave one")
        captions[name] = checked(result["caption"], str, f"{place}: caption").strip()
    return captions


def _of_answers(text: str, where: str) -> dict[str, str]:
    """Captions of the last pass in a file of answers."""
    objects, broken = parse_json_lines(text, where=where)
    if broken:
        raise ConfigError(f"line {broken[0][0]} of {where} is broken: {broken[0][1]}")
    by_run: dict[tuple[str, str], dict[str, str]] = {}
    for number, line in objects:
        if line.get("type") != ANSWERS.line or str(line.get("part")).startswith(_REVIEW):
            continue
        place = f"line {number} of {where}"
        model, part, item, answer = (
            checked(line.get(key), str, f"{place}: {key}") for key in (*ANSWERS.keys, ANSWERS.value)
        )
        run = by_run.setdefault((model, part), {})
        if item in run:
            raise ConfigError(f"{place} is a second caption of {printable(item)}; leave one")
        run[item] = answer.strip()
    models = list(dict.fromkeys(model for model, _ in by_run))
    if len(models) != 1:
        held = f"of several models, {', '.join(models)}" if models else "of none"
        raise ConfigError(f"{where} holds answers {held}; {_FORMS}")
    parts = [part for _, part in by_run]
    numbers = {_pass_number(part): part for part in parts}
    if len(parts) > 1 and None in numbers:
        raise ConfigError(f"{where} holds answers of several kinds, {', '.join(parts)}; {_FORMS}")
    last = parts[0] if len(parts) == 1 else numbers[max(n for n in numbers if n is not None)]
    return by_run[models[0], last]


def _pass_number(part: str) -> int | None:
    number = part.removeprefix(_PASS)
    return int(number) if part.startswith(_PASS) and number.isdecimal() else None
