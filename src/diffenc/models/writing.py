"""A backbone to a diffusers folder, which `load_backbone` and the stock pipelines read."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from diffenc.denoiser.lora.adapters import plain_state
from diffenc.errors import OutputError
from diffenc.models.base import Backbone
from diffenc.models.family_files import FAMILY_FILES

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_folder(backbone: Backbone, folder: Path) -> None:
    """Write every part of a backbone, in the dtype that it has; LoRA is left out.

    The folder appears whole or not at all, in place of one that was there before. A U-Net that was
    shortened is written as it is: it is read with the same taps and `truncate` alone.

    Args:
        backbone: Backbone to write; its U-Net may hold adapters, merged ones too.
        folder: Folder to write to; it is made anew, and what it held before is gone.

    Raises:
        OutputError: The folder cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        index: dict[str, Any] = {"_class_name": backbone.pipeline}
        parts = {**backbone.parts(), "scheduler": _for_pipelines(backbone.scheduler)}
        parts |= {name: part for name, part in vars(backbone).items() if "tokenizer" in name}
        for name, part in parts.items():
            _write_part(part, partial / name)
            library = "transformers" if name.startswith(("text", "tokenizer")) else "diffusers"
            index[name] = [library, type(part).__name__]
        index |= _rest(backbone)
        (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {folder}: {error}") from error


def _write_part(part: Any, folder: Path) -> None:
    if not hasattr(part, "save_config") or not hasattr(part, "state_dict"):
        part.save_pretrained(str(folder))
        return
    part.save_config(str(folder))
    state: dict[str, Tensor] = plain_state(part)
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})


def _for_pipelines(scheduler: Any) -> Any:
    """With what the published schedulers of these models say, and diffenc does not read."""
    published = {"steps_offset": 1, "clip_sample": False}
    known = {key: value for key, value in published.items() if key in scheduler.config}
    own = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return type(scheduler).from_config({**own, **known})


def _rest(backbone: Backbone) -> dict[str, Any]:
    """What the pipelines want named beside the parts."""
    files = FAMILY_FILES[backbone.family]
    absent = (*files.absent, *[name for name in files.optional if not hasattr(backbone, name)])
    rest: dict[str, Any] = {name: [None, None] for name in absent}
    if backbone.family == "sdxl":
        rest["force_zeros_for_empty_prompt"] = backbone.uncond_rule == "zeros"
    if "safety_checker" in absent:
        rest["requires_safety_checker"] = False
    return rest
