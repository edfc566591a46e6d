"""A checkpoint of LLaVA with a tower of diffenc, as a model that answers questions."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffenc.errors import BackboneError
from diffenc.evals.answerers import Images
from diffenc.evals.folder_answerer import FolderAnswerer, free_memory
from diffenc.hosts.spec import TowerSpec
from diffenc.mllm.chat import IMAGE_MARK
from diffenc.storage.names import expanded, is_file
from diffenc.storage.reading import read_json

_LORA = "adapter_config.json"


class HostedVLM(FolderAnswerer):
    """A checkpoint of LLaVA, its own or of transformers, as an `Answerer`.

    A LoRA checkpoint of LLaVA's own package is put on the language model that it names. Each
    question stands behind its pictures, in the conversation template of the model. The encoder
    is prompted with the question. Arguments, attributes and errors are those of
    `FolderAnswerer`.
    """

    prompt_policy = "question"

    def load(self) -> Any:
        """The model, as the plug-in for lmms-eval opens it; loaded once.

        Raises:
            DiffencError: The model cannot be loaded, or LLaVA's package is not there.
        """
        from diffenc.evals.lmms_eval.opening import open_model

        scale = self.guidance_scale
        if scale not in self._opened:
            self._opened.clear()  # one at a time: a guided tower stays guided
            self._opened[scale] = open_model(
                str(self.folder),
                device=torch.device(self._device),
                dtype=self._dtype,
                guidance_scale=scale,
                **_options(self.folder),
            )
        return self._opened[scale]

    def release(self) -> None:
        """Free the memory; the next question loads the model again."""
        self._opened.clear()
        free_memory(self._device)

    def answer(
        self, images: Images, questions: Sequence[str], prompts: Sequence[str] | None = None
    ) -> list[str]:
        """Answer each question with one text, made of the likeliest tokens.

        Raises:
            DiffencError: The model cannot be loaded.
        """
        turns = [
            [{"from": "human", "value": f"{IMAGE_MARK}\n" * len(shown) + question}]
            for shown, question in zip(images, questions, strict=True)
        ]
        answers: list[str] = self.load().generate(
            [list(each) for each in images],
            turns,
            [""] * len(turns) if prompts is None else list(prompts),
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
        )
        return answers

    def _prepare(self) -> None:
        self._opened: dict[float | None, Any] = {}

    def _check_guidable(self) -> None:
        """Guidance is checked where the tower is there: when the model is opened."""


def is_hosted(folder: "str | os.PathLike[str]") -> bool:
    """Whether a folder holds a checkpoint of LLaVA with a tower of diffenc."""
    file = expanded(folder) / "config.json"
    if not is_file(file):
        return False
    config: Any = read_json(file, error=BackboneError)
    if not isinstance(config, dict):
        return False
    vision = config.get("vision_config")
    of_transformers = isinstance(vision, dict) and vision.get("model_type") == "diffenc"
    return of_transformers or TowerSpec.is_spec(config.get("mm_vision_tower"))


def _options(folder: Path) -> dict[str, str | None]:
    """What LLaVA's own loader must be told: a name by which it knows the kind, and the base."""
    config = read_json(folder / "config.json", error=BackboneError)
    if not TowerSpec.is_spec(config.get("mm_vision_tower")):
        return {}
    name = folder.resolve().name
    name = name if "llava" in name.lower() else f"llava-{name}"
    if not is_file(folder / _LORA):
        return {"model_name": name}
    base = read_json(folder / _LORA, error=BackboneError).get("base_model_name_or_path")
    return {"model_name": name if "lora" in name else f"{name}-lora", "model_base": base}
