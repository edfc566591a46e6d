"""A saved `DiffusionVLM` as a model that answers questions; it is loaded at the first question."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffenc.config import check_guidable
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError, ConfigError
from diffenc.evals.answerers import Images
from diffenc.evals.folder_answerer import FolderAnswerer, free_memory
from diffenc.fusion import FusedEncoder
from diffenc.mllm.model import DiffusionVLM
from diffenc.mllm.model_folder import CONFIG_FILE, ENCODER, is_saved, read_saved
from diffenc.models.encoder_folder import CONFIG_FILE as ENCODER_CONFIG
from diffenc.models.encoder_folder import read_config
from diffenc.storage.names import is_file, is_folder

_RUN_FOLDER = "model"  # where a training run writes the model, in its own folder


class SavedVLM(FolderAnswerer):
    """A folder that `DiffusionVLM.save_pretrained` wrote, as an `Answerer`.

    The folder of a training run, which holds the model as `model`, stands for that model.
    Arguments, attributes and errors are those of `FolderAnswerer`.
    """

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

    def _locate(self, folder: Path) -> Path:
        for place in (folder, folder / _RUN_FOLDER):
            if is_saved(place):
                return place
        what = "has no whole model in it" if is_folder(folder) else "does not exist"
        raise BackboneError(
            f"the folder {folder} {what}; pass what DiffusionVLM.save_pretrained or diffenc train "
            f"wrote, which holds {CONFIG_FILE}"
        )

    def _folder_name(self) -> str:
        whole = self.folder.resolve()
        in_run = whole.name == _RUN_FOLDER and whole.parent.name
        return whole.parent.name if in_run else whole.name

    def _prepare(self) -> None:
        saved = read_saved(self.folder)
        self._kind, self.prompt_policy = saved.encoder_kind, saved.prompt_policy
        self._weights = _Weights(self.folder, self._device, self._dtype)

    def _check_guidable(self) -> None:
        folder = self.folder / ENCODER
        if self._kind == "vision":
            raise ConfigError(
                f"the encoder of {self.name} reads no text, so that there is nothing to guide; "
                "leave the guidance scale out"
            )
        if self._kind == "diffusion" and is_file(folder / ENCODER_CONFIG):
            check_guidable(read_config(folder)[0].conditioning, self.name)


class _Weights:
    """The model of a folder, loaded once for all guidance scales."""

    def __init__(self, folder: Path, device: str | torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self._vlm: DiffusionVLM | None = None
        self._config: Any = None

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
        free_memory(self.device)
