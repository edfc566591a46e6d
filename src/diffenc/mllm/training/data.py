"""Conversations in LLaVA's format with pictures: read, checked as a whole, made to batches."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from diffenc.errors import ConfigError, ImageError, PromptError
from diffenc.inputs.images import broken_images, load_image
from diffenc.inputs.pictures.files import read_picture
from diffenc.inputs.policies import PromptPolicy, PromptSample, captions_of
from diffenc.mllm.chat import IGNORE_ID, IMAGE_MARK, Chat, ChatTokens, as_messages
from diffenc.mllm.samples import pad
from diffenc.storage.lines import parse_json_lines
from diffenc.storage.names import expanded, is_file
from diffenc.storage.reading import DATA_BYTES, parse_json, read_text

BROKEN = "broken"
"""Key of a batch for the samples whose pictures could no longer be read after the first check."""

_NAMED = 20


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


def check_pictures(
    samples: Sequence[TrainSample],
    report: DataReport,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[TrainSample]:
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


class ConversationDataset(Dataset[dict[str, Any]]):
    """Samples as token ids and pictures, indexed by (epoch, index) as `EpochSampler` gives them.

    Args:
        samples: Samples, as `read_samples` gives them.
        chat: Converter of conversations into token ids.
        policy: Policy of the encoder's prompt, which is drawn anew in each epoch.
        max_length: Largest number of tokens of a sample, pictures included.
        tokens_per_image: Number of tokens that a picture takes.
        seed: Seed of the prompts.
        as_files: Whether to give pictures as `ImageFile`, which names its content, instead of
            decoded.
        skip_broken: Whether a sample whose picture cannot be read gets a blank one in its place,
            and no answer to learn from: batches keep their shape and the order of samples stays as
            it is.
    """

    def __init__(
        self,
        samples: Sequence[TrainSample],
        chat: Chat,
        policy: PromptPolicy,
        *,
        max_length: int = 2048,
        tokens_per_image: int = 1,
        seed: int = 0,
        as_files: bool = False,
        skip_broken: bool = False,
    ) -> None:
        self.samples, self.chat, self.policy = samples, chat, policy
        self.max_length, self.tokens_per_image = max_length, tokens_per_image
        self.seed, self.as_files, self.skip_broken = seed, as_files, skip_broken

    def __len__(self) -> int:
        return len(self.samples)

    def tokens(self, index: int) -> ChatTokens:
        """Token ids and labels of a sample."""
        sample = self.samples[index]
        encoded = self.chat.encode(sample.conversation)
        return encoded.cut_to(self.max_length, self.tokens_per_image)

    def prompt(self, index: int, epoch: int) -> str:
        """The encoder's prompt of a sample in an epoch; "" where it has no picture."""
        if not self.samples[index].images:
            return ""
        return self.policy(self.samples[index].prompt_sample(), seed=self.seed, epoch=epoch)

    def __getitem__(self, place: "int | tuple[int, int]") -> dict[str, Any]:
        epoch, index = (0, place) if isinstance(place, int) else place
        sample, tokens, broken = self.samples[index], self.tokens(index), None
        try:
            files, pictures = self._pictures(sample)
        except ImageError as error:
            if not self.skip_broken:
                raise
            broken = f"{sample.key}: {error}"
            tokens = ChatTokens(tokens.input_ids, [IGNORE_ID] * len(tokens.labels))
            files = [self._blank] * len(sample.images)
            pictures = [file.open() for file in files]
        row = {
            "tokens": tokens,
            "images": files if self.as_files else pictures,
            "prompt": self.prompt(index, epoch),
        }
        return row if broken is None else {**row, "broken": broken}

    def _pictures(self, sample: TrainSample) -> "tuple[list[ImageFile], list[Image.Image]]":
        files = [ImageFile.read(path) for path in sample.images]
        decode = self.skip_broken or not self.as_files
        return files, [file.open() for file in files] if decode else []

    @cached_property
    def _blank(self) -> "ImageFile":
        """A grey picture, of the size of the first one that can be read."""
        size = (64, 64)
        for path in dict.fromkeys(path for sample in self.samples for path in sample.images):
            with suppress(ImageError):
                size = ImageFile.read(path).open().size
                break
        stream = BytesIO()
        Image.new("RGB", size, (128, 128, 128)).save(stream, "PNG")
        return ImageFile.of(stream.getvalue(), "a blank picture")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A picture that is decoded only when it is needed.

    Attributes:
        path: Path of the file, for messages.
        content: Bytes of the file.
        digest: Digest of the content.
    """

    path: str
    content: bytes
    digest: str

    @classmethod
    def read(cls, path: Path) -> "ImageFile":
        """Read a file.

        Raises:
            ImageError: It cannot be read.
        """
        try:
            return cls.of(read_picture(path), str(path))
        except ImageError as error:
            raise _of_picture(error) from error

    @classmethod
    def of(cls, content: bytes, path: str) -> "ImageFile":
        """A file that was read."""
        return cls(path, content, hashlib.blake2b(content, digest_size=16).hexdigest())

    def open(self) -> Image.Image:
        """Decode it: upright, RGB.

        Raises:
            ImageError: It is no picture.
        """
        try:
            return load_image(self.content, name=self.path)
        except ImageError as error:
            raise _of_picture(error) from error


def _of_picture(error: ImageError) -> ImageError:
    known = "cannot read the image "
    message = str(error)
    return ImageError(
        f"cannot read the picture {message.removeprefix(known)}"
        if message.startswith(known)
        else f"cannot read the picture: {message}"
    )


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch for `DiffusionVLM.forward`, and under `BROKEN` what was left out of it."""
    tokens: list[ChatTokens] = [row["tokens"] for row in rows]
    input_ids, attention_mask = pad(tokens)
    length = input_ids.shape[1]
    labels = [each.labels + [IGNORE_ID] * (length - len(each.labels)) for each in tokens]
    broken = [row["broken"] for row in rows if "broken" in row]
    more = {BROKEN: broken} if broken else {}
    return {
        **more,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": torch.tensor(labels, dtype=torch.long, device="cpu"),
        "images": [row["images"] for row in rows],
        "prompts": [row["prompt"] for row in rows],
    }


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) in an order that depends on seed and epoch alone.

    Args:
        length: Number of samples of the data set.
        seed: Seed of the order.
    """

    def __init__(self, length: int, *, seed: int = 0) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, before its first batch is asked for."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + epoch)
        for index in torch.randperm(
            self.length, generator=generator, dtype=torch.long, device="cpu"
        ).tolist():
            yield epoch, index


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
    return None
