"""The folder that a multimodal model is saved to.

    vlm.json          options, which kind of encoder, and what else lies here
    projector/        see `diffenc.projector`
    encoder/          of a diffusion or fused encoder: its own folder, without the backbone
    language_model/   weights, config and tokenizer, where they were trained or asked for
    lora/             a LoRA adapter of the language model, in peft's layout

`vlm.json` is removed first and written last: a folder with one is whole.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from diffenc.digests import is_marked, weights_mark
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError, ConfigError, OutputError
from diffenc.fusion import FusedEncoder
from diffenc.pretrained import lasting_name, read_name, stored_name
from diffenc.projector.fused import FusedProjector
from diffenc.projector.plain import Projector
from diffenc.vlm.language import load_language_model
from diffenc.vlm.vision import VisionTokens

CONFIG_FILE = "vlm.json"
PROJECTOR, ENCODER, LANGUAGE_MODEL, LORA = "projector", "encoder", "language_model", "lora"


def is_saved(folder: "str | os.PathLike[str]") -> bool:
    """Whether a folder holds a whole model."""
    return (Path(folder) / CONFIG_FILE).is_file()


def save(vlm: Any, folder: "str | os.PathLike[str]", include_language_model: bool | None) -> None:
    """Write a `DiffusionVLM`; see the top of this file.

    Raises:
        OutputError: The folder cannot be written.
        ConfigError: The language model has no name and shall not be included.
    """
    from peft import PeftModel

    target, model = Path(folder), vlm.language_model
    adapted = isinstance(model, PeftModel)
    base = model.get_base_model() if adapted else model
    name = getattr(base, "name_or_path", "") or ""
    name = lasting_name(name) if name else ""
    changed = any(
        p.requires_grad for path, p in model.named_parameters() if ".lora_" not in path
    ) or getattr(base, "_diffenc_included", False)
    included = (changed or not name) if include_language_model is None else include_language_model
    if not included and not name:
        raise ConfigError(
            "this language model has no name to be found by; save it with "
            "include_language_model=True"
        )
    if included and adapted:
        raise ConfigError(
            "a language model with LoRA is saved by its name, and this one has none or was "
            "trained itself; merge the adapter first: "
            "vlm.language_model = vlm.language_model.merge_and_unload()"
        )
    content = {
        "encoder": _encoder_told(vlm.encoder, target),
        "encoder_mark": weights_mark(vlm.encoder)
        if isinstance(vlm.encoder, VisionTokens)
        else None,
        "language_model": None if included else stored_name(name, target),
        "language_mark": None if included else weights_mark(base),
        "lora": adapted,
        "template": vlm.chat.template,
        "system": vlm.chat.system,
        "prompt_policy": str(vlm.prompt_policy),
        "image_batch_size": vlm.image_batch_size,
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / CONFIG_FILE).unlink(missing_ok=True)
        vlm.projector.save_pretrained(target / PROJECTOR)
        if not isinstance(vlm.encoder, VisionTokens):
            vlm.encoder.save_pretrained(target / ENCODER)
        if included:
            model.save_pretrained(target / LANGUAGE_MODEL)
        if included or adapted:
            vlm.tokenizer.save_pretrained(target / (LANGUAGE_MODEL if included else LORA))
        if adapted:
            model.save_pretrained(target / LORA)
        partial = target / f"{CONFIG_FILE}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(target / CONFIG_FILE)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error}") from error


def load(
    folder: "str | os.PathLike[str]",
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    trainable: bool,
    language_model: Any,
    encoder_options: dict[str, Any],
) -> tuple[tuple[Any, Any, Any, Any], dict[str, Any]]:
    """Encoder, language model, tokenizer and projector; and the options of the model.

    Raises:
        BackboneError: The folder does not hold a whole model, or a part is missing.
    """
    source = Path(folder)
    try:
        told = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
        kind, name, adapted = told.pop("encoder"), told.pop("language_model"), told.pop("lora")
        described = {**kind, "mark": told.get("encoder_mark")}
        mark = told.get("language_mark")
        if name is not None and language_model is None:
            name = read_name(name, source)
        options = {key: told[key] for key in ("template", "system", "prompt_policy")}
        options["image_batch_size"] = told["image_batch_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"{source} does not hold what DiffusionVLM.save_pretrained wrote: {error!r}"
        ) from error
    needed = [PROJECTOR] + [LANGUAGE_MODEL] * (name is None) + [LORA] * adapted
    needed += [ENCODER] * (described["kind"] != "vision")
    if missing := [part for part in needed if not (source / part).is_dir()]:
        raise BackboneError(f"{source} is not whole: it lacks {', '.join(missing)}")
    encoder = _load_encoder(source, described, device, dtype, trainable, encoder_options)
    model, tokenizer = load_language_model(
        language_model or name or source / LANGUAGE_MODEL, device=device, dtype=dtype
    )
    if name is None and language_model is None:
        model._diffenc_included = True  # its name is a folder that may go
    if name is not None and language_model is None and mark and not is_marked(model, mark):
        raise BackboneError(
            f"{name!r} is not the language model that {source} was saved with: its weights differ; "
            "put that one back, or pass language_model="
        )
    if adapted:
        model = _with_lora(model, source / LORA, trainable)
    projector = _load_projector(source / PROJECTOR).to(device)
    return (encoder, model, tokenizer, projector), options


def _encoder_told(encoder: Any, folder: Path) -> dict[str, Any]:
    """What finds an encoder again."""
    if isinstance(encoder, FusedEncoder):
        return {"kind": "fused"}
    if isinstance(encoder, DiffusionEncoder):
        return {"kind": "diffusion"}
    if isinstance(encoder, VisionTokens) and encoder.name:
        return {
            "kind": "vision",
            "name": stored_name(encoder.name, folder),
            "layer": encoder.layer,
        }
    raise ConfigError(
        f"{type(encoder).__name__} has no name to be found by; load it with "
        "VisionTokens.from_pretrained(name)"
    )


def _load_encoder(
    source: Path,
    told: dict[str, Any],
    device: str | torch.device,
    dtype: torch.dtype,
    trainable: bool,
    options: dict[str, Any],
) -> Any:
    if told["kind"] == "vision":
        if options:
            raise ConfigError(f"a vision model takes none of {sorted(options)}")
        name = read_name(told["name"], source)
        vision = VisionTokens.from_pretrained(name, layer=told["layer"], device=device, dtype=dtype)
        if told["mark"] and not is_marked(vision, told["mark"]):
            raise BackboneError(
                f"{name!r} is not the vision model that {source} was saved with: its weights "
                "differ; put that one back"
            )
        return vision
    kind: Any = FusedEncoder if told["kind"] == "fused" else DiffusionEncoder
    return kind.from_pretrained(
        source / ENCODER, device=device, dtype=dtype, trainable=trainable, **options
    )


def _with_lora(model: Any, folder: Path, trainable: bool) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
            return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except Exception as error:  # peft raises whatever a broken file makes it raise
        raise BackboneError(
            f"{folder} holds no LoRA adapter of this language model: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def _load_projector(folder: Path) -> Any:
    try:
        options = json.loads((folder / "projector.json").read_text(encoding="utf-8"))
        kind: Any = FusedProjector if "how" in options else Projector
    except (OSError, ValueError, TypeError) as error:
        raise BackboneError(f"{folder} holds no whole projector: {error!r}") from error
    return kind.from_pretrained(folder)
