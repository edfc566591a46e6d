"""Models in folders that answer questions: what they are called by, and loaded when asked."""

import copy
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from diffenc.errors import BackboneError
from diffenc.evals.answerers import Images
from diffenc.evals.items import check_positive
from diffenc.storage.names import expanded, is_file, reason

_CHUNK = 2**22


class FolderAnswerer(ABC):
    """A model in a folder, as an `Answerer`.

    The model is loaded when the first question is asked. Where all answers are in a file already,
    it is never loaded. Models made by `guided` and `described` share its weights.

    Args:
        folder: Folder of the model.
        name: Name of the model in tables and files; None takes the name of the folder.
        max_new_tokens: Largest number of tokens in an answer, 1 or more.
        device: Device that the model runs on.
        dtype: Floating point type of the frozen parts of the model.
        description: Further facts that the answers depend on, such as the policy of prompts; None
            adds nothing.

    Attributes:
        folder: Folder of the model.
        name: Name of the model in tables and files.
        guidance_scale: Scale s of guided features f_u + s (f_c - f_u); None leaves the features
            as they were in training.
        prompt_policy: Prompt policy that the model was trained with.

    Raises:
        BackboneError: The folder holds no such model.
        ConfigError: `max_new_tokens` is below 1.
    """

    prompt_policy: str

    def __init__(
        self,
        folder: "str | os.PathLike[str]",
        *,
        name: str | None = None,
        max_new_tokens: int = 64,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        check_positive(max_new_tokens=max_new_tokens)
        self.folder = self._locate(expanded(folder))
        self.name = name or self._folder_name()
        self.guidance_scale: float | None = None
        self._max_new_tokens, self._more = max_new_tokens, dict(description or {})
        self._device, self._dtype = device, dtype
        self._files = _Files(self.folder)
        self._prepare()

    @property
    def prompt_dropout(self) -> float:
        """Share of prompts that were empty in training."""
        _, *changes = self.prompt_policy.split("|")
        kept = 1.0
        for change in changes:
            name, _, share = change.strip().rstrip(")").partition("(")
            kept *= 1 - float(share) if name == "dropout" else 1
        return 1 - kept

    @property
    def description(self) -> Mapping[str, Any]:
        """Content of the folder, precision and options; models that it refers to count by name."""
        guided = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {
            "weights": self._files.digest,
            "dtype": str(self._dtype).removeprefix("torch."),
            "max_new_tokens": self._max_new_tokens,
            **guided,
            **self._more,
        }

    def guided(self, scale: float) -> Self:
        """The same model with guided features f_u + s (f_c - f_u); weights are loaded once.

        Raises:
            ConfigError: Its encoder has no such features.
        """
        self._check_guidable()
        made = copy.copy(self)
        made.guidance_scale = scale
        return made

    def described(self, **more: Any) -> Self:
        """The same model with a longer description; weights are loaded once."""
        made = copy.copy(self)
        made._more = {**self._more, **more}
        return made

    @abstractmethod
    def load(self) -> Any:
        """The model itself, guided as this one is; loaded once.

        Raises:
            DiffencError: The model cannot be loaded.
        """

    @abstractmethod
    def release(self) -> None:
        """Free the memory; the next question loads the model again."""

    @abstractmethod
    def answer(
        self, images: Images, questions: Sequence[str], prompts: Sequence[str] | None = None
    ) -> list[str]:
        """Answer each question with one text, made of the likeliest tokens.

        Raises:
            DiffencError: The model cannot be loaded, or a question is longer than its context.
        """

    def _locate(self, folder: Path) -> Path:
        """The folder that holds the model, where this one does."""
        return folder

    def _folder_name(self) -> str:
        return self.folder.resolve().name

    @abstractmethod
    def _prepare(self) -> None:
        """Set the prompt policy, and the holder of weights that guided models share."""

    @abstractmethod
    def _check_guidable(self) -> None:
        """Refuse an encoder that has no guided features, where that is known unloaded."""


def free_memory(device: str | torch.device) -> None:
    """Give the memory of models that are no longer used back to the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


class _Files:
    """Files of a folder, read once for all models that share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def digest(self) -> str:
        """Digest of the names and contents of all files."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self._folder.rglob("*") if is_file(path)):
            digest.update(f"{path.relative_to(self._folder).as_posix()}\0".encode())
            try:
                with path.open("rb") as file:
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
            except OSError as error:
                raise BackboneError(f"cannot read {path}: {reason(error)}") from error
        return digest.hexdigest()[:16]
