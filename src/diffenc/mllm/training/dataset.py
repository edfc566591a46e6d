"""Samples as token ids and pictures, made to batches in an order that seed and epoch decide."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from diffenc.errors import ConfigError, ImageError
from diffenc.inputs.images import load_image
from diffenc.inputs.pictures.files import read_picture
from diffenc.inputs.policies import PromptPolicy
from diffenc.mllm.chat import IGNORE_ID, Chat, ChatTokens
from diffenc.mllm.model import DiffusionVLM
from diffenc.mllm.samples import pad
from diffenc.mllm.training.config import DataConfig
from diffenc.mllm.training.data import TrainSample

BROKEN = "broken"
"""Key of a batch for the samples that teach nothing: their pictures could no longer be read after
the first check, or their answers are cut off."""


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
        sample, tokens = self.samples[index], self.tokens(index)
        broken = None
        if all(label == IGNORE_ID for label in tokens.labels):
            broken = (
                f"{sample.key}: no token of its answer within data.max_length = {self.max_length}"
            )
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


def make_dataset(
    data: DataConfig,
    vlm: DiffusionVLM,
    samples: Sequence[TrainSample],
    *,
    seed: int,
    as_files: bool,
) -> ConversationDataset:
    """The data set of a run, under the model's own chat and prompt policy.

    Args:
        data: Options of the data.
        vlm: Model that learns from it.
        samples: Usable samples.
        seed: Seed of the prompts.
        as_files: Whether to give pictures as `ImageFile`.

    Raises:
        ConfigError: A picture takes more tokens than a sample may have.
    """
    each = vlm.tokens_per_image or 1
    limit = min(data.max_length, vlm.context or data.max_length)
    shown = max((len(sample.images) for sample in samples), default=0)
    if shown * each >= limit:
        raise ConfigError(
            f"the sample with most pictures shows {shown} of {each} tokens each, and a sample may "
            f"have {limit} (data.max_length, the language model's context); use a coarser grid: "
            "grid in [model.options]"
        )
    return ConversationDataset(
        samples,
        vlm.chat,
        vlm.prompt_policy,
        max_length=limit,
        tokens_per_image=each,
        seed=seed,
        as_files=as_files,
        skip_broken=data.skip_broken,
    )


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
