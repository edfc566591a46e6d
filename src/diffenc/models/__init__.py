"""Models by name: aliases, Hub ids, local folders, single files; and by their parts."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from diffenc._typing import Prediction
from diffenc.denoiser.shortening import shortened
from diffenc.errors import BackboneError, ConfigError
from diffenc.models.base import Backbone
from diffenc.models.configs import Architecture
from diffenc.models.device import Device, Dtype, as_dtype, check_placement
from diffenc.models.family_files import FAMILY_FILES
from diffenc.models.folder import assemble, load_folder
from diffenc.models.locating import describe_located, locate, model_name
from diffenc.models.memory_format import arrange
from diffenc.models.parts import GivenParts, fitting_tokenizer, load_tokenizer
from diffenc.models.pipelines import PIPELINE, pipeline_name, pipeline_parts
from diffenc.models.schedules import make_scheduler
from diffenc.models.sd import StableDiffusion
from diffenc.models.sdxl import StableDiffusionXL
from diffenc.models.single_file import SingleFile
from diffenc.models.sources import SOURCES, BackboneSource, cached_folder, resolve_folder
from diffenc.models.taps import TapInfo, match_taps
from diffenc.runtime.defaults import torch_defaults
from diffenc.runtime.inference import lasting
from diffenc.runtime.precision import cast, fitting_dtype
from diffenc.storage.reading import reading_once
from diffenc.storage.weights import check_variant

__all__ = [
    "Architecture",
    "Backbone",
    "BackboneSource",
    "StableDiffusion",
    "StableDiffusionXL",
    "TapInfo",
    "describe",
    "list_backbones",
    "list_taps",
    "load_backbone",
    "match_taps",
    "model_name",
    "resolve_folder",
]


def list_backbones() -> tuple[BackboneSource, ...]:
    """Every alias with what it leads to."""
    return tuple(SOURCES.values())


ChooseTaps: TypeAlias = Callable[[Architecture], Sequence[str] | None]
"""Function from what a model's configs tell to the taps that are kept; None keeps all."""


@reading_once()
@torch_defaults()
@lasting
def load_backbone(
    name: Any,
    *,
    dtype: Dtype = None,
    device: Device = None,
    keep_taps: Sequence[str] | ChooseTaps | None = None,
    architecture: "str | os.PathLike[str] | None" = None,
    prediction_type: Prediction | None = None,
    channels_last: bool | None = None,
    variant: str | None = None,
    unet: Any = None,
    transformer: Any = None,
    vae: Any = None,
    text_encoder: Any = None,
    text_encoder_2: Any = None,
    tokenizer: Any = None,
    tokenizer_2: Any = None,
) -> Backbone:
    """Load a model.

    Args:
        name: An alias of `list_backbones`, a Hub id ("owner/name"), a diffusers folder, a
            `.safetensors` checkpoint in the original layout, a `StableDiffusionPipeline` or
            `StableDiffusionXLPipeline` (or their img2img), whose parts are used as they are:
            frozen and put into evaluation mode, not copied; or a `Backbone`, which is returned.
        dtype: Floating point type of the U-Net and the text encoders, or its name: float32,
            bfloat16 or float16. None is float32, or the type that a pipeline or a `Backbone`
            already has.
        device: Device of the parts: a name, a number or a `torch.device`. None is the CPU, or the
            device that a pipeline or a `Backbone` is already on.
        keep_taps: Readable places of the U-Net, see `list_taps`; what lies behind the last of them
            is neither loaded nor run. None loads everything. A function is asked, with what the
            configs tell, before any weight is read.
        architecture: Alias or diffusers folder whose configs describe a single file, where the file
            does not show that itself.
        prediction_type: Kind of the U-Net's prediction: "epsilon", "v_prediction" or "sample". None
            takes what the file or the folder says; another value wins over both.
        channels_last: Memory format of convolutions; None takes what was measured to be fastest,
            see `diffenc.models.memory_format`, and leaves a pipeline and a `Backbone` as is.
        variant: Word in the names of a folder's weight files, such as "fp16" or "non_ema"; a part
            without such files is read from those that it has. "" names the files without a word.
            None takes these, and those in half precision ("fp16") where there are no others, or
            where `dtype` is float16: that is all the precision it holds. bfloat16 has a wider range
            than float16 and is made of the full files where there are any.
        unet: Replacement for the model's own U-Net: a `UNet2DConditionModel`, a state dict or a
            `.safetensors` file (CleanDIFT's, for one), with any prefix.
        transformer: Replacement for the model's own transformer: a module of the same class, or the
            folder of one.
        vae: Replacement for the model's own VAE: an `AutoencoderKL` or `AutoencoderTiny` (TAESD),
            its folder, or a `.safetensors` file that fits the model's.
        text_encoder: Replacement for the model's own text encoder: a `CLIPTextModel` or its folder.
        text_encoder_2: Replacement for SDXL's second text encoder: a `CLIPTextModelWithProjection`
            or its folder.
        tokenizer: Replacement for the model's own tokenizer: a `CLIPTokenizer` or its folder. A
            single file needs it unless the Hub's cache has one of an alias.
        tokenizer_2: Replacement for the tokenizer of SDXL's second text encoder; None takes
            `tokenizer` for a single file.

    Raises:
        BackboneError: Unknown, not to be had, incomplete or broken; a part does not fit; or a
            model of another kind.
        ConfigError: The device or its support of `dtype` is missing, options contradict, or the
            model contradicts itself.
        TapError: One of `keep_taps` names nothing.
    """
    replaced = GivenParts(
        unet=unet,
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
    )
    if isinstance(name, Backbone):
        options = (keep_taps, architecture, prediction_type, variant)
        if replaced.references() or any(option is not None for option in options):
            raise ConfigError(
                "a Backbone has its parts and is not truncated; pass the name that it is loaded "
                "by, or build another one of your parts"
            )
        _check_place(name, device, dtype)
        return name if channels_last is None else arrange(name, channels_last)
    place, kind = check_placement(device, dtype), as_dtype(dtype)
    variant = check_variant(variant)
    located = locate(name, architecture, prediction_type)
    described = describe_located(located, replaced)
    if callable(keep_taps):
        keep_taps = keep_taps(described)
    if keep_taps is not None:
        keep_taps = [tap.name for tap in described.match_taps(keep_taps)]
    second = [part for part in replaced.references() if part.endswith("_2")]
    if second and second[0] not in FAMILY_FILES[described.family].parts:
        raise ConfigError(f"{second[0]} is SDXL's; this model has one text encoder: leave it out")
    if located.is_pipeline:
        if replaced.references():
            raise ConfigError(
                f"a pipeline has its parts; put {', '.join(replaced.references())} into the "
                "pipeline"
            )
        if variant is not None:
            raise ConfigError("variant= is for a folder of files; a pipeline has its weights")
        backbone = _of_pipeline(
            name, described, keep_taps, place if device else None, dtype and kind
        )
        return backbone if channels_last is None else arrange(backbone, channels_last)
    if located.file is not None:
        if variant is not None:
            path = located.file.path
            raise ConfigError(f"variant= is for a folder of several files; {path} is one file")
        backbone = _load_single_file(
            located.file, located.configs, described, replaced, kind, place, keep_taps
        )
    else:
        name = located.name
        backbone = load_folder(
            resolve_folder(name, dtype=kind, variant=variant, without=replaced.references()),
            name=name,
            dtype=kind,
            device=place,
            described=described,
            keep_taps=keep_taps,
            replaced=replaced,
            variant=variant,
        )
        backbone.scheduler = _scheduler(described)
    backbone.replacements, backbone.variant = replaced.references(), variant
    if located.chosen:
        backbone.replacements["architecture"] = located.configs
    if prediction_type is not None:
        backbone.replacements["prediction_type"] = prediction_type
    return arrange(backbone, channels_last)


def _scheduler(described: Architecture) -> Any:
    flow = FAMILY_FILES[described.family].flow
    return make_scheduler(described.configs["scheduler"], flow=flow)


def _check_place(backbone: Backbone, device: Device, dtype: Dtype) -> None:
    """Raise a `ConfigError` where a `Backbone` is to be somewhere else than it is."""
    if dtype is not None and as_dtype(dtype) != backbone.dtype:
        raise ConfigError(
            f"{backbone.name!r} is in {backbone.dtype}, and dtype={dtype} was passed beside it; a "
            "Backbone stays as it is: call backbone.to(dtype) first, or leave dtype out"
        )
    if device is not None:
        place, own = check_placement(device, None), backbone.device
        if place.type != own.type or (place.index is not None and place.index != own.index):
            raise ConfigError(
                f"{backbone.name!r} is on {own}, and device={str(device)!r} was passed beside it; "
                "a Backbone stays where it is: call backbone.to(device) first, or leave device out"
            )


def _of_pipeline(
    pipeline: Any,
    described: Architecture,
    keep_taps: Sequence[str] | None,
    device: torch.device | None,
    dtype: Any,
) -> Backbone:
    parts = pipeline_parts(pipeline)
    parts["scheduler"] = _scheduler(described)
    modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    for name, module in modules.items():
        parts[name] = module if dtype is None else cast(module, dtype)
    denoiser = described.denoiser
    if keep_taps is not None:
        parts[denoiser] = shortened(parts[denoiser], keep_taps)
    place = parts[denoiser].device if device is None else device
    backbone = assemble(pipeline_name(pipeline), described, parts, place)
    backbone.replacements = {PIPELINE: None}
    return backbone


def _load_single_file(
    opened: SingleFile,
    alias: str,
    described: Architecture,
    replaced: GivenParts,
    dtype: torch.dtype,
    device: torch.device,
    keep_taps: Sequence[str] | None,
) -> Backbone:
    parts: dict[str, Any] = {"scheduler": _scheduler(described)}
    for part in (part for part in described.configs if part != "scheduler"):
        loaded = replaced.load(part, described, dtype=dtype, keep_taps=keep_taps)
        if loaded is None:
            kept = fitting_dtype(described.configs[part], dtype)
            loaded = opened.part(part, described, dtype=kept, keep_taps=keep_taps)
        parts[part] = loaded
    family_parts = FAMILY_FILES[described.family].parts
    for part in (each for each in family_parts if each.startswith("tokenizer")):
        loaded = _tokenizer_of_file(opened.path, part, alias, replaced, described)
        encoder = parts[part.replace("tokenizer", "text_encoder")]
        parts[part] = fitting_tokenizer(loaded, encoder, _PAD_TOKENS.get((alias, part)))
    return assemble(str(opened.path), described, parts, device)


# What the published tokenizers pad with; those of other models that share the words may differ.
_PAD_TOKENS = {
    ("sd1.5", "tokenizer"): "<|endoftext|>",
    ("sd2.1-base", "tokenizer"): "!",
    ("sd2.1", "tokenizer"): "!",
    ("sdxl", "tokenizer"): "<|endoftext|>",
    ("sdxl", "tokenizer_2"): "!",
}


def _tokenizer_of_file(
    path: Path, part: str, alias: str, replaced: GivenParts, described: Architecture
) -> Any:
    """The given one, that of the folder with the configs, or one that the Hub's cache has."""
    for source in (getattr(replaced, part), replaced.tokenizer):
        if source is not None:
            is_path = isinstance(source, (str, os.PathLike))
            return load_tokenizer(source, part) if is_path else source
    if alias not in SOURCES:
        return load_tokenizer(Path(alias), part)
    # The words of all Stable Diffusions are the same: those of CLIP.
    for known in dict.fromkeys((alias, *SOURCES)):
        if folder := cached_folder(known, "tokenizer/vocab.json"):
            return load_tokenizer(folder)
    raise BackboneError(
        f"{path} holds no tokenizer, and the Hub's cache has none of {alias!r}. Pass tokenizer= "
        "with a folder that holds vocab.json and merges.txt, such as tokenizer/ of any Stable "
        "Diffusion in diffusers' layout or 'openai/clip-vit-large-patch14'."
    )


@reading_once()
@lasting
def describe(
    name: Any,
    *,
    architecture: "str | os.PathLike[str] | None" = None,
    prediction_type: Prediction | None = None,
    unet: Any = None,
    transformer: Any = None,
    vae: Any = None,
) -> Architecture:
    """What a model's configs tell, without its weights; for aliases without network too.

    Args:
        name: Name of the model, as for `load_backbone`.
        architecture: Alias or folder whose configs describe a single file, as for `load_backbone`.
        prediction_type: Kind of the U-Net's prediction, as for `load_backbone`.
        unet: Replacement for the model's own U-Net, as for `load_backbone`; a module's config
            counts.
        transformer: Replacement for the model's own transformer, as for `load_backbone`.
        vae: Replacement for the model's own VAE, as for `load_backbone`.

    Raises:
        BackboneError: See `load_backbone`.
        ConfigError: See `load_backbone`.
    """
    located = locate(name, architecture, prediction_type)
    return describe_located(located, GivenParts(unet=unet, transformer=transformer, vae=vae))


def list_taps(name: Any) -> tuple[TapInfo, ...]:
    """Every readable place of a model's U-Net, without its weights.

    Args:
        name: Name of the model, as for `load_backbone`.

    Raises:
        BackboneError: See `load_backbone`.
    """
    return name.taps() if isinstance(name, Backbone) else describe(name).taps()
