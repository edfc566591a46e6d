"""Conversations in LLaVA's format with pictures: read, and checked as a whole."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Protocol, TypeVar

from diffenc.errors import ConfigError, PromptError
from diffenc.inputs.images import broken_images
from diffenc.inputs.policies import PromptPolicy, PromptSample, captions_of, strip_template
from diffenc.mllm.chat import IMAGE_MARK, as_messages
from diffenc.mllm.training.config import DataConfig
from diffenc.storage.lines import parse_json_lines
from diffenc.storage.names import expanded, is_file
from diffenc.storage.reading import DATA_BYTES, parse_json, read_text

_CAPTION = "caption"
_NAMED = 20
_THREADS = 8


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One conversation and its pictures.

    Attributes:
        key: Name of the sample, which also seeds its prompts.
        images: Paths, in the order in which they are shown.
        conversation: Turns ``{"from": "human" | "gpt", "value": text}``.
        captions: Texts about the picture, for policies that draw on them.
        place: Index of its record in the annotations.
    """

    key: str
    images: tuple[Path, ...]
    conversation: tuple[Mapping[str, str], ...]
    captions: tuple[str, ...] = ()
    place: int = 0

    def content(self) -> list[Any]:
        """What is learnt from it, beside the pictures, as JSON holds it; its name comes first."""
        return [self.key, [dict(turn) for turn in self.conversation], self.captions]

    def prompt_sample(self) -> PromptSample:
        """What a prompt policy sees."""
        return PromptSample(self.key, self.conversation, self.captions)


@dataclass(slots=True)
class DataReport:
    """What was found in a data set.

    Attributes:
        samples: Number of usable samples.
        images: Number of pictures of the usable samples.
        text_only: Number of samples without a picture.
        problems: Samples that cannot be used, by kind of problem.
        left_out: Indices of the records of these samples in the annotations.
    """

    samples: int = 0
    images: int = 0
    text_only: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[int] = field(default_factory=list)

    @property
    def broken(self) -> int:
        """How many samples cannot be used."""
        return sum(map(len, self.problems.values()))

    def add(self, kind: str, where: str, place: int) -> None:
        """Note a problem of the record at a place."""
        self.problems.setdefault(kind, []).append(where)
        self.left_out.append(place)

    def describe(self, examples: int = 3) -> str:
        """Counts, with a few examples of each problem."""
        parts = []
        for kind, places in self.problems.items():
            some = ", ".join(places[:examples]) + (", ..." if len(places) > examples else "")
            parts.append(f"{len(places)} {kind} ({some})")
        return "; ".join(parts)


def check_data(
    data: DataConfig,
    policy: PromptPolicy,
    *,
    left_out: Collection[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[TrainSample], DataReport]:
    """Every usable sample, or an error that tells all that is wrong.

    Args:
        data: Options of the data.
        policy: Policy of the encoder's prompt.
        left_out: Indices of records that are left out, see `read_samples`; pictures are then not
            looked at.
        progress: Function that is called with the number of pictures looked at so far, and with the
            number of all.

    Raises:
        ConfigError: See `require_usable`.
    """
    samples, report = read_samples(
        data.annotations, data.images, limit=data.limit, policy=policy, left_out=left_out
    )
    if data.check_images and left_out is None:
        threads = min(_THREADS, os.cpu_count() or 1)
        samples = check_pictures(samples, report, workers=threads, progress=progress)
    require_usable(report, skip_broken=data.skip_broken)
    return samples, report


def read_samples(
    annotations: "str | os.PathLike[str]",
    images: "str | os.PathLike[str]",
    *,
    limit: int | None = None,
    policy: PromptPolicy | None = None,
    left_out: Collection[int] | None = None,
) -> tuple[list[TrainSample], DataReport]:
    """Every usable sample of a file, and what is wrong with the others.

    Args:
        annotations: JSON with a list, or JSON lines: ``id``, ``image`` (a name, several, or none),
            ``conversations``, and optionally ``captions``.
        images: Folder that names of pictures are relative to.
        limit: Number of records that are looked at, from the first on; None is all.
        policy: Policy that is asked for a prompt of each sample, so that a sample that lacks a
            question or a caption is found now.
        left_out: Indices of the records of these samples in the annotations.

    Raises:
        ConfigError: The file cannot be read or is of another form.
    """
    folder = expanded(images)
    report = DataReport()
    samples: list[TrainSample] = []
    keys: Counter[str] = Counter()
    for index, record in enumerate(_records(Path(annotations), limit)):
        if isinstance(record, BrokenLine):
            report.add("that are no JSON", record.place, index)
            continue
        own = record.get("id") if isinstance(record, Mapping) else None
        name = str(index if own is None else own)
        if left_out is not None and index in left_out:
            report.add("left out when the run began", name, index)
            continue
        problem = _problem(record, folder, look=left_out is None)
        if problem is not None:
            report.add(problem[0], problem[1] or name, index)
            continue
        keys[name] += 1
        key = name if keys[name] == 1 else f"{name}#{keys[name]}"  # LLaVA's mixture repeats ids
        sample = _sample(record, key, folder, index)
        if policy is not None and (lack := _lack(policy, sample)):
            report.add(lack, name, index)
            continue
        samples.append(sample)
        report.images += len(sample.images)
        report.text_only += not sample.images
    report.samples = len(samples)
    return samples, report


class Pictured(Protocol):
    """A sample with pictures."""

    @property
    def images(self) -> tuple[Path, ...]:
        """Paths of the pictures."""

    @property
    def place(self) -> int:
        """Index of its record in the annotations."""


_Sample = TypeVar("_Sample", bound=Pictured)


def check_pictures(
    samples: Sequence[_Sample],
    report: DataReport,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[_Sample]:
    """Samples all of whose pictures can be decoded as a whole; the others go into the report.

    Args:
        samples: Samples that `read_samples` found.
        report: Report of `read_samples`, which is brought up to date.
        workers: Number of threads that decode.
        progress: Function that is called with the number of pictures looked at so far, and with the
            number of all.
    """
    paths = list(dict.fromkeys(path for sample in samples for path in sample.images))
    if not paths:
        return list(samples)
    faults = broken_images(paths, workers=workers, progress=progress)
    broken = {paths[place]: fault for place, fault in faults.items()}
    whole = []
    for sample in samples:
        if fault := next((broken[path] for path in sample.images if path in broken), None):
            named = fault.removeprefix("cannot read the image ")
            report.add("with unreadable images", named, sample.place)
            report.images -= len(sample.images)
        else:
            whole.append(sample)
    report.samples = len(whole)
    return whole


def require_usable(report: DataReport, *, skip_broken: bool) -> None:
    """Raise unless training can start.

    Raises:
        ConfigError: There is nothing to learn from, or something broken that is not to be skipped.
    """
    if report.broken and not skip_broken:
        raise ConfigError(
            f"{report.broken} of {report.broken + report.samples} samples cannot be used: "
            f"{report.describe(_NAMED)}. Repair the data, or train without them: "
            "data.skip_broken = true"
        )
    if not report.samples:
        raise ConfigError(f"the data holds no usable sample. {report.describe()}".rstrip())


@dataclass(frozen=True, slots=True)
class BrokenLine:
    """A line of a JSON-lines file that holds no object.

    Attributes:
        place: Number of the line, and what is wrong with it.
    """

    place: str


def _records(path: Path, limit: int | None) -> list[Any]:
    text = read_text(path, most=DATA_BYTES)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        content: Any = parse_json(text, object, where=str(path))
        if not isinstance(content, list):
            raise ConfigError(
                f"{path} must hold a list of samples, as LLaVA's files do, got "
                f"{type(content).__name__}"
            )
        return content[:limit]
    objects, broken = parse_json_lines(text, where=path.name)
    lines: dict[int, Any] = dict(objects)
    lines |= {number: BrokenLine(detail) for number, detail in broken}
    return [lines[number] for number in sorted(lines)][:limit]


def _names(record: Mapping[str, Any]) -> list[str] | None:
    """Names of the pictures; None where the entry is neither a name nor a list of names."""
    image = record.get("image")
    names = [] if image is None or image == "" else [image] if isinstance(image, str) else image
    whole = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    return names if whole else None


def _problem(record: Any, folder: Path, *, look: bool) -> tuple[str, str] | None:
    """Why a record cannot be used, and what to name; "" names the sample.

    The existence of its pictures is checked only if `look` is set.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("conversations"), list):
        return "without a list of conversations", ""
    name = record.get("id")
    if isinstance(name, bool) or not isinstance(name, (str, int, NoneType)):
        return "whose id is no text and no whole number", ""
    names = _names(record)
    if names is None:
        return "whose image is no name and no list of names", ""
    missing = [name for name in names if look and not is_file(folder / name)]
    if missing:
        return "with missing images", missing[0]
    try:
        messages = as_messages(record["conversations"])
    except PromptError:
        return "whose turns do not alternate between human and gpt", ""
    if messages[-1]["role"] != "assistant":
        return "that do not end with an answer", ""
    places = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if places != len(names):
        return f"whose {IMAGE_MARK} marks do not match their images", ""
    captions = record.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        return "whose captions are no list of texts", ""
    if not isinstance(record.get("caption", ""), str):
        return "whose caption is no text", ""
    return None


def _sample(record: Mapping[str, Any], key: str, folder: Path, place: int) -> TrainSample:
    turns, captions = tuple(record["conversations"]), captions_of(record)
    images = tuple(folder / name for name in _names(record) or ())
    return TrainSample(key, images, turns, captions, place)


def _lack(policy: PromptPolicy, sample: TrainSample) -> str | None:
    if not sample.images:
        return None
    try:
        policy(sample.prompt_sample())
    except PromptError:
        return f"without what the prompt policy {str(policy)!r} needs"
    if _CAPTION in str(policy) and not all(map(strip_template, sample.captions)):
        return f"with a caption without words, on which the prompt policy {str(policy)!r} draws"
    return None
