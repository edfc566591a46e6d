"""The model that a folder holds: a `DiffusionVLM`, LLaVA of transformers, or LLaVA's own."""

from pathlib import Path
from typing import Any

import torch

from diffenc.errors import BackboneError, ConfigError
from diffenc.evals.lmms_eval.answering import Answering, VLMAnswers
from diffenc.evals.saved_vlm import SavedVLM
from diffenc.hosts.spec import TowerSpec
from diffenc.mllm.model_folder import is_saved
from diffenc.storage.names import expanded, is_file, is_folder
from diffenc.storage.reading import read_json

_CONFIG = "config.json"
_OF_LLAVA = ("conv_template", "model_base", "model_name", "package")


def open_model(
    pretrained: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    guidance_scale: float | None = None,
    conv_template: str | None = None,
    **llava: str | None,
) -> Answering:
    """Load the model of a folder.

    Args:
        pretrained: Folder of a `DiffusionVLM` or of its training run, or checkpoint of LLaVA or
            LLaVA-NeXT with a tower of diffenc: of transformers, or of LLaVA's own package.
        device: Device of the model.
        dtype: Floating point type of the model.
        guidance_scale: Guidance scale s of the features f_u + s (f_c - f_u); None leaves it as it
            was trained.
        conv_template: Conversation template of LLaVA's own package, such as "vicuna_v1"; None
            takes that one.
        llava: For LLaVA's own package: `model_base`, the language model below a LoRA or stage 1
            checkpoint; `model_name`, by which LLaVA tells what to load; `package`, the name of
            its module.

    Raises:
        BackboneError: The folder holds none of these.
        ConfigError: An option does not belong to what it holds.
    """
    folder = expanded(pretrained)
    if is_saved(folder) or is_saved(folder / "model"):
        _refuse(folder, "a DiffusionVLM", conv_template=conv_template, **llava)
        saved = SavedVLM(folder, device=device, dtype=dtype)
        if guidance_scale is not None:
            saved = saved.guided(guidance_scale)
        return VLMAnswers(saved)
    config = _config_of(folder)
    if _mapping(config.get("vision_config")).get("model_type") == "diffenc":
        from diffenc.evals.lmms_eval.llava_transformers import TransformersLlava

        _refuse(folder, "LLaVA of transformers", conv_template=conv_template, **llava)
        return TransformersLlava(folder, device=device, dtype=dtype, guidance_scale=guidance_scale)
    if TowerSpec.is_spec(config.get("mm_vision_tower")):
        from diffenc.evals.lmms_eval.llava_package import PackageLlava

        return PackageLlava(
            folder,
            device=device,
            dtype=dtype,
            guidance_scale=guidance_scale,
            conv_template=conv_template or "vicuna_v1",
            model_base=llava.get("model_base"),
            model_name=llava.get("model_name"),
            package=llava.get("package") or "llava",
        )
    raise BackboneError(
        f"the model in {folder} has no vision tower of diffenc: its {_CONFIG} names neither a "
        "vision_config of model_type 'diffenc' nor an mm_vision_tower that begins with 'diffenc:'. "
        "lmms-eval has models of its own for others (--model llava_hf)"
    )


def _config_of(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG
    if not is_file(file):
        what = "holds no model" if is_folder(folder) else "does not exist"
        raise BackboneError(
            f"pretrained={folder} {what}; pass the folder that DiffusionVLM.save_pretrained or "
            "diffenc train wrote, or a checkpoint of LLaVA with a tower of diffenc"
        )
    config: dict[str, Any] = read_json(file, error=BackboneError)
    return config


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _refuse(folder: Path, what: str, **options: str | None) -> None:
    if unfit := [name for name in _OF_LLAVA if options.get(name) is not None]:
        raise ConfigError(
            f"{' and '.join(unfit)} belong to checkpoints of LLaVA's own package; {folder} holds "
            f"{what}, which knows its template and its parts itself"
        )
