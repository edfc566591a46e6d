"""The folder that a multimodal model is saved to.

    vlm.json          options, which kind of encoder, and what else lies here
    projector/        see `diffenc.projector`
    encoder/          of a diffusion or fused encoder: its own folder, without the backbone;
                      of a vision model: its image processor
    language_model/   weights, config and tokenizer, where they were trained or asked for
    lora/             a LoRA adapter of the language model, in peft's layout

`vlm.json` is removed first and written last: a folder with one is whole.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from diffenc.config import check_choice
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError, ConfigError, PromptError
from diffenc.fusion import FusedEncoder
from diffenc.inputs.policies import parse_policy
from diffenc.memory.digests import is_alike, is_marked, weights_mark, words_mark
from diffenc.mllm.language import (
    check_language_lora,
    load_language_model,
    open_language_lora,
    open_language_tokenizer,
)
from diffenc.mllm.vision import VisionTokens
from diffenc.projector.fused import FusedProjector
from diffenc.projector.plain import Projector
from diffenc.runtime.defaults import torch_defaults
from diffenc.runtime.threads import without_warnings
from diffenc.storage.folder_kinds import kind_of_folder
from diffenc.storage.names import checked_path, is_file, is_folder, printable, reason
from diffenc.storage.pretrained import (
    lasting_name,
    read_name,
    saved_image_processor,
    stored_name,
)
from diffenc.storage.reading import read_json
from diffenc.storage.schema import check_keys, checked, make
from diffenc.storage.writing import begin_folder, reporting, write_json

CONFIG_FILE = "vlm.json"
_ADAPTER = "default"
PROJECTOR, ENCODER, LANGUAGE_MODEL, LORA = "projector", "encoder", "language_model", "lora"


@dataclass(frozen=True, slots=True, kw_only=True)
class VLMContents:
    """What `vlm.json` says.

    Attributes:
        encoder: Description of the encoder: its `kind`, "diffusion", "fused" or "vision", and for
            "vision" its `name` and `layer`.
        language_model: Name of the language model; None where it lies in the folder.
        lora: Whether an adapter of the language model lies in the folder.
        template: Template of conversations, see `Chat`.
        system: System message; None is the template's own.
        prompt_policy: Policy of the encoder's prompts.
        image_batch_size: Largest number of pictures per call of the encoder; None is all at once.
        encoder_mark: Numbers by which a vision model is known again.
        language_mark: Numbers by which the language model is known again, where it has a name.
        words_mark: Numbers by which the tokenizer is known again, where it does not lie in the
            folder.
    """

    encoder: Mapping[str, Any]
    language_model: str | None
    lora: bool
    template: Literal["chat", "v1", "plain"]
    system: str | None
    prompt_policy: str
    image_batch_size: int | None
    encoder_mark: tuple[float, ...] | None = None
    language_mark: tuple[float, ...] | None = None
    words_mark: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        kind, keys = self.encoder_kind, ["kind"]
        check_choice("encoder.kind", kind, ("diffusion", "fused", "vision"))
        if kind == "vision":
            keys += ["name", "layer", "pad"]
            checked(self.encoder.get("name"), str, "encoder.name")
            checked(self.encoder.get("layer"), int, "encoder.layer")
            checked(self.encoder.get("pad", False), bool, "encoder.pad")
        check_keys(self.encoder, keys, "encoder")
        parse_policy(self.prompt_policy)
        if self.image_batch_size is not None and self.image_batch_size < 1:
            raise ConfigError(f"image_batch_size must be 1 or more, got {self.image_batch_size}")

    @property
    def encoder_kind(self) -> str:
        """Kind of the encoder."""
        return str(self.encoder.get("kind"))


def read_saved(folder: Path) -> VLMContents:
    """What the config of a saved model says.

    Raises:
        BackboneError: The folder holds none, or a broken one.
    """
    if not is_saved(folder):
        kind = kind_of_folder(folder)
        other = f", it holds {kind}" if kind else ""
        raise BackboneError(
            f"{printable(folder)} does not hold a model: there is no {CONFIG_FILE} in it{other}. "
            "`diffenc train` and DiffusionVLM.save_pretrained write such folders"
        )
    try:
        saved: VLMContents = make(VLMContents, read_json(folder / CONFIG_FILE))
    except (ConfigError, PromptError) as error:
        raise BackboneError(
            f"{folder} does not hold a model: {CONFIG_FILE} is not what "
            f"DiffusionVLM.save_pretrained wrote: {error}"
        ) from error
    return saved


def is_saved(folder: "str | os.PathLike[str]") -> bool:
    """Whether a folder holds a whole model."""
    return is_file(Path(folder) / CONFIG_FILE)


def save(vlm: Any, folder: "str | os.PathLike[str]", include_language_model: bool | None) -> None:
    """Write a `DiffusionVLM`; see the top of this file.

    Raises:
        OutputError: The folder cannot be written.
        ConfigError: The language model has no name and shall not be included, or adapters that the
            folder does not hold.
    """
    from peft import PeftModel

    target, model = Path(folder), vlm.language_model
    adapted = isinstance(model, PeftModel)
    if adapted:
        _check_adapter(model)
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
        "words_mark": None if included or adapted else words_mark(vlm.tokenizer),
        "lora": adapted,
        "template": vlm.chat.template,
        "system": vlm.chat.system,
        "prompt_policy": str(vlm.prompt_policy),
        "image_batch_size": vlm.image_batch_size,
    }
    begin_folder(target, CONFIG_FILE)
    with reporting(target):
        vlm.projector.save_pretrained(target / PROJECTOR)
        if not isinstance(vlm.encoder, VisionTokens):
            vlm.encoder.save_pretrained(target / ENCODER)
        else:
            vlm.encoder.image_processor.save_pretrained(target / ENCODER)
        if included:
            model.save_pretrained(target / LANGUAGE_MODEL)
        if included or adapted:
            vlm.tokenizer.save_pretrained(target / (LANGUAGE_MODEL if included else LORA))
        if adapted:
            model.save_pretrained(target / LORA)
    write_json(target / CONFIG_FILE, content)


def _check_adapter(model: Any) -> None:
    """Raise a `ConfigError` unless one adapter is there and in use: the folder holds no other."""
    names = list(model.peft_config)
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    used = {() if layer.disable_adapters else tuple(layer.active_adapters) for layer in layers}
    if names == [_ADAPTER] and used <= {(_ADAPTER,)}:
        return
    active = sorted({name for each in used for name in each})
    raise ConfigError(
        f"the language model has the adapters {names}, of which {active or 'none'} are in use, and "
        f"a saved model has one, {_ADAPTER!r}, that is: delete the others with "
        "vlm.language_model.delete_adapter(name), turn that one on, or merge it and save the whole "
        "with include_language_model=True"
    )


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
    source = checked_path("a saved model", folder, error=BackboneError)
    saved = read_saved(source)
    name, adapted, mark = saved.language_model, saved.lora, saved.language_mark
    if name is not None and language_model is None:
        name = read_name(name, source)
    needed = [PROJECTOR] + [LANGUAGE_MODEL] * (name is None) + [LORA] * adapted
    needed += [ENCODER] * (saved.encoder_kind != "vision")
    if missing := [part for part in needed if not is_folder(source / part)]:
        raise BackboneError(f"{source} is not whole: it lacks {', '.join(missing)}")
    encoder = _load_encoder(source, saved, device, dtype, trainable, encoder_options)
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
    named = saved.words_mark is not None and language_model is None
    if named and not is_alike(words_mark(tokenizer), saved.words_mark):
        raise BackboneError(
            f"{name!r} has not the tokenizer that {source} was saved with; put that one back, or "
            "save the model again with include_language_model=True"
        )
    if adapted:
        weights = open_language_lora(source / LORA)
        model = _with_lora(model, source / LORA, trainable)
        check_language_lora(model, weights)
    if adapted and language_model is None:
        tokenizer = open_language_tokenizer(source / LORA)
    projector = _load_projector(source / PROJECTOR).to(device)
    options = ("template", "system", "prompt_policy", "image_batch_size")
    return (encoder, model, tokenizer, projector), {key: getattr(saved, key) for key in options}


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
            **({"pad": True} if encoder.pad else {}),
        }
    raise ConfigError(
        f"{type(encoder).__name__} has no name to be found by; load it with "
        "VisionTokens.from_pretrained(name)"
    )


def _load_encoder(
    source: Path,
    saved: VLMContents,
    device: str | torch.device,
    dtype: torch.dtype,
    trainable: bool,
    options: dict[str, Any],
) -> Any:
    description = saved.encoder
    if saved.encoder_kind == "vision":
        if options:
            raise ConfigError(f"a vision model takes none of {sorted(options)}")
        name = read_name(description["name"], source)
        processor = saved_image_processor(source / ENCODER)
        vision = VisionTokens.from_pretrained(
            name,
            image_processor=processor,
            layer=description["layer"],
            pad=description.get("pad", False),
            device=device,
            dtype=dtype,
        )
        if saved.encoder_mark and not is_marked(vision, saved.encoder_mark):
            raise BackboneError(
                f"{name!r} is not the vision model that {source} was saved with: its weights "
                "differ; put that one back"
            )
        return vision
    kind: Any = FusedEncoder if saved.encoder_kind == "fused" else DiffusionEncoder
    return kind.from_pretrained(
        source / ENCODER, device=device, dtype=dtype, trainable=trainable, **options
    )


def _with_lora(model: Any, folder: Path, trainable: bool) -> Any:
    from peft import PeftModel

    try:
        # peft asks transformers by an old name.
        with torch_defaults(), without_warnings(category=FutureWarning):
            return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except Exception as error:  # peft raises whatever a broken file makes it raise
        raise BackboneError(
            f"{folder} holds no LoRA adapter of this language model: {reason(error)}"
        ) from error


def _load_projector(folder: Path) -> Any:
    options = read_json(folder / "projector.json", error=BackboneError)
    kind: Any = FusedProjector if "how" in options else Projector
    return kind.from_pretrained(folder)
