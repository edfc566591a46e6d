"""A saved `DiffusionVLM` as a model that answers questions; it is loaded at the first question."""

import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diffenc.config import check_guidable
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError, ConfigError
from diffenc.evals.answerers import Images
from diffenc.evals.items import check_positive
from diffenc.fusion import FusedEncoder
from diffenc.mllm.model import DiffusionVLM
from diffenc.mllm.model_folder import CONFIG_FILE, ENCODER, is_saved, read_saved
from diffenc.models.encoder_folder import CONFIG_FILE as ENCODER_CONFIG
from diffenc.models.encoder_folder import read_config
from diffenc.storage.names import expanded, is_file, is_folder, reason

_RUN_FOLDER = "model"  # where a training run writes the model, in its own folder
_CHUNK = 2**22


class SavedVLM:
    """A folder that `DiffusionVLM.save_pretrained` wrote, as an `Answerer`.

    The model is loaded when the first question is asked. Where all answers are in a file already,
    it is never loaded.

    Args:
        folder: Folder of the model, or the folder of the training run that holds it as `model`.
        name: Name of the model in tables and files; None takes the name of the folder.
        max_new_tokens: Largest number of tokens in an answer, 1 or more.
        device: Device that the model runs on.
        dtype: Floating point type of the frozen parts of the model.
        description: Further facts that the answers depend on, such as the policy of prompts; None
            adds nothing.

    Attributes:
        prompt_policy: Prompt policy that the model was trained with.

    Raises:
        BackboneError: The folder holds no such model.
        ConfigError: `max_new_tokens` is below 1.
    """

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
        self.folder = _found(expanded(folder))
        self.name = name or _name(self.folder)
        self.guidance_scale: float | None = None
        self._kind, self.prompt_policy = _read(self.folder)
        self._max_new_tokens, self._more = max_new_tokens, dict(description or {})
        self._weights = WeightsOfFolder(self.folder, device, dtype)

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
            "weights": self._weights.digest,
            "dtype": str(self._weights.dtype).removeprefix("torch."),
            "max_new_tokens": self._max_new_tokens,
            **guided,
            **self._more,
        }

    def guided(self, scale: float) -> "SavedVLM":
        """The same model with guided features f_u + s (f_c - f_u); weights are loaded once.

        Raises:
            ConfigError: Its encoder has no such features.
        """
        self._check_guidable()
        made = copy.copy(self)
        made.guidance_scale = scale
        return made

    def described(self, **more: Any) -> "SavedVLM":
        """The same model with a longer description; weights are loaded once."""
        made = copy.copy(self)
        made._more = {**self._more, **more}
        return made

    def load(self) -> DiffusionVLM:
        """The model itself, guided as this one is; loaded once.

        Raises:
            BackboneError: The model cannot be loaded.
        """
        return self._weights.load(self.guidance_scale)

    def release(self) -> None:
        """Free the memory; the next question loads the model again."""
        self._weights.release()

    def answer(
        self, images: Images, questions: Sequence[str], prompts: Sequence[str] | None = None
    ) -> list[str]:
        """Answer each question with one text, made of the likeliest tokens.

        Raises:
            DiffencError: The model cannot be loaded, or a question is longer than its context.
        """
        return self.load().generate(
            [list(each) for each in images],
            list(questions),
            None if prompts is None else list(prompts),
            max_new_tokens=self._max_new_tokens,
        )

    def _check_guidable(self) -> None:
        folder = self.folder / ENCODER
        if self._kind == "vision":
            raise ConfigError(
                f"the encoder of {self.name} reads no text, so that there is nothing to guide; "
                "leave the guidance scale out"
            )
        if self._kind == "diffusion" and is_file(folder / ENCODER_CONFIG):
            check_guidable(read_config(folder)[0].conditioning, self.name)


class WeightsOfFolder:
    """The model of a folder, loaded once for all guidance scales."""

    def __init__(self, folder: Path, device: str | torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self._vlm: DiffusionVLM | None = None
        self._config: Any = None

    @cached_property
    def digest(self) -> str:
        """Return a digest of the names and contents of all files."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(self.folder).as_posix()}\0".encode())
            try:
                with path.open("rb") as file:
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
            except OSError as error:
                raise BackboneError(f"cannot read {path}: {reason(error)}") from error
        return digest.hexdigest()[:16]

    def load(self, scale: float | None) -> DiffusionVLM:
        """The model, guided by this scale; None leaves it as it was trained."""
        if self._vlm is None:
            self._vlm = DiffusionVLM.from_pretrained(
                self.folder, device=self.device, dtype=self.dtype
            )
            self._config = getattr(self._vlm.encoder, "config", None)
        if self._config is not None:
            config = self._config
            if scale is not None:
                check_guidable(config.conditioning, str(self.folder))
                config = replace(config, conditioning="cfg", guidance_scale=scale)
            encoder = self._vlm.encoder
            encoder = encoder.diffusion if isinstance(encoder, FusedEncoder) else encoder
            if isinstance(encoder, DiffusionEncoder):
                encoder.config = config
        return self._vlm

    def release(self) -> None:
        """Free the memory of the model."""
        self._vlm = self._config = None
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()


def _found(folder: Path) -> Path:
    for place in (folder, folder / _RUN_FOLDER):
        if is_saved(place):
            return place
    what = "has no whole model in it" if is_folder(folder) else "does not exist"
    raise BackboneError(
        f"the folder {folder} {what}; pass what DiffusionVLM.save_pretrained or diffenc train "
        f"wrote, which holds {CONFIG_FILE}"
    )


def _name(folder: Path) -> str:
    whole = folder.resolve()
    return whole.parent.name if whole.name == _RUN_FOLDER and whole.parent.name else whole.name


def _read(folder: Path) -> tuple[str, str]:
    """Kind of encoder and policy of prompts, which are needed before the model is loaded."""
    saved = read_saved(folder)
    return saved.encoder_kind, saved.prompt_policy
