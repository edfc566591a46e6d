"""Conversations in LLaVA's format with pictures: read, checked as a whole, made to batches."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from diffenc.errors import ConfigError, ImageError, PromptError
from diffenc.policies import PromptPolicy, PromptSample
from diffenc.vlm.chat import IGNORE_ID, IMAGE_MARK, Chat, ChatTokens, as_messages
from diffenc.vlm.samples import pad


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One conversation and its pictures.

    Attributes:
        key: Names it; its prompts are seeded by that.
        images: Paths, in the order in which they are shown.
        conversation: Turns ``{"from": "human" | "gpt", "value": text}``.
        captions: Texts about the picture, for policies that draw on them.
    """

    key: str
    images: tuple[Path, ...]
    conversation: tuple[Mapping[str, str], ...]
    captions: tuple[str, ...] = ()

    def prompt_sample(self) -> PromptSample:
        """What a prompt policy sees."""
        return PromptSample(self.key, self.conversation, self.captions)


@dataclass(slots=True)
class DataReport:
    """What was found in a data set.

    Attributes:
        samples: Usable samples.
        images: Their pictures.
        text_only: Samples without a picture.
        problems: By kind of problem, the samples that cannot be used.
    """

    samples: int = 0
    images: int = 0
    text_only: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def broken(self) -> int:
        """How many samples cannot be used."""
        return sum(map(len, self.problems.values()))

    def add(self, kind: str, where: str) -> None:
        """Note a problem."""
        self.problems.setdefault(kind, []).append(where)

    def describe(self, examples: int = 3) -> str:
        """Counts, with a few examples of each problem."""
        parts = []
        for kind, found in self.problems.items():
            some = ", ".join(found[:examples]) + (", ..." if len(found) > examples else "")
            parts.append(f"{len(found)} {kind} ({some})")
        return "; ".join(parts)


def read_samples(
    annotations: "str | os.PathLike[str]",
    images: "str | os.PathLike[str]",
    *,
    limit: int | None = None,
    policy: PromptPolicy | None = None,
) -> tuple[list[TrainSample], DataReport]:
    """Every usable sample of a file, and what is wrong with the others.

    Args:
        annotations: JSON with a list, or JSON lines: ``id``, ``image`` (a name, several, or none),
            ``conversations``, and optionally ``captions``.
        images: Folder that names of pictures are relative to.
        limit: Look at the first records alone.
        policy: Asked for a prompt of each sample, so that one that lacks a question or a caption is
            found now.

    Raises:
        ConfigError: The file cannot be read or is of another form.
    """
    folder = Path(images)
    report = DataReport()
    samples: list[TrainSample] = []
    keys: Counter[str] = Counter()
    for index, record in enumerate(_records(Path(annotations))):
        if limit is not None and index >= limit:
            break
        name = str(record.get("id", index)) if isinstance(record, Mapping) else str(index)
        problem = _problem(record, folder)
        if problem is not None:
            report.add(problem[0], problem[1] or name)
            continue
        keys[name] += 1
        key = name if keys[name] == 1 else f"{name}#{keys[name]}"  # LLaVA's mixture repeats ids
        sample = _sample(record, key, folder)
        if policy is not None and (lack := _lack(policy, sample)):
            report.add(lack, name)
            continue
        samples.append(sample)
        report.images += len(sample.images)
        report.text_only += not sample.images
    report.samples = len(samples)
    return samples, report


def require_usable(report: DataReport, *, skip_broken: bool) -> None:
    """Raise unless training can start.

    Raises:
        ConfigError: There is nothing to learn from, or something broken that is not to be skipped.
    """
    if report.broken and not skip_broken:
        raise ConfigError(
            f"{report.broken} of {report.broken + report.samples} samples cannot be used: "
            f"{report.describe()}. Repair the data, or train without them: data.skip_broken = true"
        )
    if not report.samples:
        raise ConfigError(f"the data holds no usable sample. {report.describe()}".rstrip())


class ConversationDataset(Dataset[dict[str, Any]]):
    """Samples as token ids and pictures. It is asked for (epoch, index), as `EpochSampler` gives.

    Args:
        samples: See `read_samples`.
        chat: Makes token ids.
        policy: Of the encoder's prompt, drawn anew in each epoch.
        max_length: Tokens of a sample, pictures included.
        tokens_per_image: How many a picture takes.
        seed: Of prompts.
        as_files: Give pictures as `ImageFile`, which names its content, instead of decoded.
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
    ) -> None:
        self.samples, self.chat, self.policy = samples, chat, policy
        self.max_length, self.tokens_per_image = max_length, tokens_per_image
        self.seed, self.as_files = seed, as_files

    def __len__(self) -> int:
        return len(self.samples)

    def tokens(self, index: int) -> ChatTokens:
        """Token ids and labels of a sample."""
        sample = self.samples[index]
        encoded = self.chat.encode(sample.conversation)
        return encoded.truncated(self.max_length, self.tokens_per_image)

    def prompt(self, index: int, epoch: int) -> str:
        """The encoder's prompt of a sample in an epoch; "" where it has no picture."""
        if not self.samples[index].images:
            return ""
        return self.policy(self.samples[index].prompt_sample(), seed=self.seed, epoch=epoch)

    def __getitem__(self, place: "int | tuple[int, int]") -> dict[str, Any]:
        epoch, index = (0, place) if isinstance(place, int) else place
        files = [ImageFile.read(path) for path in self.samples[index].images]
        return {
            "tokens": self.tokens(index),
            "images": files if self.as_files else [file.open() for file in files],
            "prompt": self.prompt(index, epoch),
        }


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A picture that is decoded only when it is needed.

    Attributes:
        path: Of the file, for messages.
        content: Its bytes.
        digest: Names the content.
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
            content = path.read_bytes()
        except OSError as error:
            raise ImageError(f"cannot read {path}: {error}") from error
        return cls(str(path), content, hashlib.blake2b(content, digest_size=16).hexdigest())

    def open(self) -> Image.Image:
        """Decode it.

        Raises:
            ImageError: It is no picture.
        """
        try:
            image = Image.open(BytesIO(self.content))
            image.load()
        except Exception as error:  # Pillow raises many kinds on broken files
            raise ImageError(f"cannot read the picture {self.path}: {error}") from error
        return image


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch for `DiffusionVLM.forward`."""
    tokens: list[ChatTokens] = [row["tokens"] for row in rows]
    input_ids, attention_mask = pad(tokens)
    length = input_ids.shape[1]
    labels = [each.labels + [IGNORE_ID] * (length - len(each.labels)) for each in tokens]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": torch.tensor(labels),
        "images": [row["images"] for row in rows],
        "prompts": [row["prompt"] for row in rows],
    }


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) in an order that depends on seed and epoch alone.

    Args:
        length: Of the data set.
        seed: Of the order.
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
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        for index in torch.randperm(self.length, generator=generator).tolist():
            yield epoch, index


def _records(path: Path) -> Iterable[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, list):
        raise ConfigError(
            f"{path} must hold a list of samples, as LLaVA's files do, got {type(found).__name__}"
        )
    return found


def _names(record: Mapping[str, Any]) -> list[str]:
    image = record.get("image")
    if image is None or image == "":
        return []
    return [image] if isinstance(image, str) else list(image)


def _problem(record: Any, folder: Path) -> tuple[str, str] | None:
    """Why a record cannot be used, and what to name; "" names the sample."""
    if not isinstance(record, Mapping) or not isinstance(record.get("conversations"), list):
        return "without a list of conversations", ""
    try:
        names = _names(record)
        missing = [name for name in names if not (folder / name).is_file()]
    except TypeError:
        return "whose image is no name and no list of names", ""
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
    return None


def _sample(record: Mapping[str, Any], key: str, folder: Path) -> TrainSample:
    turns = tuple(record["conversations"])
    captions = tuple(record.get("captions", ()))
    if not captions and len(turns) == 2:
        captions = (turns[1]["value"],)  # LLaVA's first stage: the answer is the caption
    return TrainSample(key, tuple(folder / name for name in _names(record)), turns, captions)


def _lack(policy: PromptPolicy, sample: TrainSample) -> str | None:
    if not sample.images:
        return None
    try:
        policy(sample.prompt_sample())
    except PromptError:
        return f"without what the prompt policy {str(policy)!r} needs"
    return None
