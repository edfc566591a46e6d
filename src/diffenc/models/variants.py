"""Variants of Stable Diffusion that diffenc does not read, refused by name and by config field."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffenc.denoiser.transformers import layout_of
from diffenc.errors import BackboneError
from diffenc.models.denoisers import latent_channels
from diffenc.models.family_files import FAMILY_FILES, PIPELINES
from diffenc.storage.names import printable

INPUTS = {
    5: "a depth model",
    7: "an upscaler",
    8: "an InstructPix2Pix model",
    9: "an inpainting model",
}
"""Kind of a U-Net by its number of input channels, for those that take more than latents."""

_OTHERS = {  # by a part of the name of the pipeline
    "Inpaint": INPUTS[9],
    "Depth2Img": INPUTS[5],
    "Upscale": INPUTS[7],
    "Pix2Pix": INPUTS[8],
    "UnCLIP": "a model that reads embeddings of pictures",
    "LatentConsistency": "a latent consistency model, whose U-Net reads a guidance scale",
    "Flux": "a transformer that reads more than a picture and a text, or FLUX.2",
    "Kolors": "a model with another kind of text encoder",
}

# Fields that ask for an input which neither a picture nor a text gives, with what each may be.
_UNCONDITIONED: dict[str, tuple[Any, str]] = {
    "class_embed_type": (None, "class labels"),
    "num_class_embeds": (None, "class labels"),
    "encoder_hid_dim": (None, "states of another kind of encoder"),
    "encoder_hid_dim_type": (
        None,
        "states of another kind of encoder; of an IP-Adapter, call unload_ip_adapter() first",
    ),
    "time_cond_proj_dim": (None, "a guidance scale, as latent consistency models are trained"),
    "attention_type": ("default", "boxes with a text each (GLIGEN)"),
    "dual_cross_attention": (False, "a second text"),
    "only_cross_attention": (False, "the text in its self-attention"),
    "mid_block_only_cross_attention": (None, "the text in its self-attention"),
    "conv_in_kernel": (3, "latents through another first convolution"),
}


def pipeline_family(index: Mapping[str, Any], where: str) -> str:
    """Family of a pipeline by its `model_index.json`.

    Args:
        index: Content of the file: the pipeline's class and options, library and class per part.
        where: Place of the index, for messages.

    Raises:
        BackboneError: A pipeline or a part of another class, SDXL's refiner, or an option that is
            none.
    """
    kind = index.get("_class_name")
    family = PIPELINES.get(kind) if isinstance(kind, str) else None
    if family is None:
        reason = next((what for part, what in _OTHERS.items() if part in str(kind)), None)
        raise BackboneError(
            f"{where} holds a {printable(kind)}; diffenc reads {sorted(PIPELINES)}"
            + (f". This one is {reason}." if reason else "")
        )
    if family == "sdxl" and (index.get("requires_aesthetics_score") or _lacks_first(index)):
        raise BackboneError(
            f"{where} holds the refiner of SDXL, which finishes pictures of the base model and has "
            "one text encoder; diffenc reads the base"
        )
    zeros = index.get("force_zeros_for_empty_prompt", True)
    if not isinstance(zeros, bool):
        raise BackboneError(
            f"{where}: force_zeros_for_empty_prompt must be true or false, got {zeros!r}"
        )
    check_classes(index, where, family)
    return family


def _lacks_first(index: Mapping[str, Any]) -> bool:
    entry = index.get("text_encoder", ())
    return entry is None or (isinstance(entry, (list, tuple)) and list(entry) == [None, None])


def check_classes(index: Mapping[str, Any], where: str, family: str) -> None:
    """Raise a `BackboneError` for the first part of a pipeline that is of another class.

    Args:
        index: `model_index.json`: library and class per part.
        where: Place of the index, for messages.
        family: Family of the pipeline.
    """
    for part, known in FAMILY_FILES[family].classes.items():
        entry = index.get(part)
        if entry is None or not known:
            continue
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise BackboneError(f"{where}: {part} must be a library and a class, got {entry!r}")
        if entry[1] is not None and entry[1] not in known:
            raise BackboneError(
                f"{where} says that the {part} is a {entry[1]!r}; diffenc reads {list(known)}"
            )


def check_configs(configs: Mapping[str, Mapping[str, Any]], where: str, family: str) -> None:
    """Raise a `BackboneError` that names the first field of a part which asks for more.

    Args:
        configs: Config of each part, as JSON holds it.
        where: Name of the model, for messages.
        family: Family of the model.
    """
    files = FAMILY_FILES[family]
    for part in (files.denoiser, "vae"):
        known = files.classes[part]
        kind = configs[part].get("_class_name", known[0])
        if kind not in known:
            raise BackboneError(f"the {part} of {where} is a {kind!r}; diffenc reads {list(known)}")
    check_denoiser(configs[files.denoiser], where, pooled="text_encoder_2" in configs)
    check_vae(configs["vae"], where)
    check_channels(configs[files.denoiser], configs["vae"], where)


def check_denoiser(config: Mapping[str, Any], where: str, *, pooled: bool | None = None) -> None:
    """Raise a `BackboneError` that names the field by which a denoiser asks for further inputs.

    Args:
        config: Config of the denoiser, with its class.
        where: Name of the model, for messages.
        pooled: Whether there are pooled texts, see `check_unet`.
    """
    if layout_of(config) is None:
        check_unet(config, where, pooled=pooled)
    elif (value := config.get("attention_type", "default")) not in (None, "default"):
        raise BackboneError(
            f"the transformer of {where} has attention_type={value!r}: it reads boxes with a text "
            "each (GLIGEN), which features of a picture and a text do not have; pass a model "
            "without it"
        )
    elif config.get("guidance_embeds") and "Sana" in str(config["_class_name"]):
        raise BackboneError(
            f"the transformer of {where} has guidance_embeds: it is a Sana-Sprint, distilled of "
            "guided predictions, which reads a guidance scale; pass a Sana or a Sana 1.5"
        )


def check_unet(config: Mapping[str, Any], where: str, *, pooled: bool | None = None) -> None:
    """Raise a `BackboneError` that names the field by which a U-Net asks for further inputs.

    Args:
        config: Config of a `UNet2DConditionModel`.
        where: Name of the model, for messages.
        pooled: Whether there is a second text encoder, which gives pooled texts; None where this is
            unknown.
    """
    for field, (usual, needs) in _UNCONDITIONED.items():
        value = config.get(field, usual)
        plain = value is None or value == usual or (value is False and usual is None)
        if isinstance(value, (list, tuple)):
            plain = all(entry == usual for entry in value)
        if not plain:
            raise BackboneError(
                f"the U-Net of {where} has {field}={value!r}: it reads {needs}, which features of "
                "a picture and a text do not have; pass a model without it"
            )
    added = config.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise BackboneError(
            f"the U-Net of {where} has addition_embed_type={added!r}; it must be None, or "
            "'text_time' as SDXL has it"
        )
    if added == "text_time" and pooled is False:
        raise BackboneError(
            f"the U-Net of {where} has addition_embed_type='text_time': it reads pooled texts, and "
            "the model has no text_encoder_2 that gives them; an SDXL has both"
        )
    blocks = [*(config.get("down_block_types") or ()), *(config.get("up_block_types") or ())]
    blocks.append(config.get("mid_block_type"))
    if simple := [kind for kind in blocks if isinstance(kind, str) and "SimpleCross" in kind]:
        raise BackboneError(
            f"the U-Net of {where} has blocks of type {simple[0]!r}, in which the text is no "
            "cross-attention of its own; diffenc reads Stable Diffusions"
        )
    width = config.get("cross_attention_dim")
    if isinstance(width, Sequence) and len(set(width)) != 1:
        raise BackboneError(
            f"the U-Net of {where} has cross_attention_dim={list(width)}: texts of several widths"
        )


def check_vae(config: Mapping[str, Any], where: str) -> None:
    """Raise a `BackboneError` for a VAE config by which latents cannot be scaled.

    Args:
        config: Config of an `AutoencoderKL` or `AutoencoderTiny`.
        where: Name of the model, for messages.
    """
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
    if not _is_number(scale) or scale <= 0:
        raise BackboneError(
            f"the VAE of {where} has scaling_factor={scale!r}; it must be a number above 0, such "
            "as 0.18215 (Stable Diffusion) or 0.13025 (SDXL)"
        )
    if shift is not None and not _is_number(shift):
        raise BackboneError(f"the VAE of {where} has shift_factor={shift!r}; it must be a number")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return
    if mean is None or std is None:
        lacks = "latents_mean" if mean is None else "latents_std"
        raise BackboneError(f"the VAE of {where} lacks {lacks}; it must have both, or neither")
    channels = config.get("latent_channels", 4)
    for field, values in (("latents_mean", mean), ("latents_std", std)):
        usable = isinstance(values, (list, tuple)) and len(values) == channels
        if not usable or not all(map(_is_number, values)):
            raise BackboneError(
                f"the VAE of {where} has {field}={values!r}; it must hold {channels} numbers"
            )
    if min(std) <= 0:
        raise BackboneError(f"the VAE of {where} has latents_std={std!r}; all must be above 0")
    if shift:
        raise BackboneError(
            f"the VAE of {where} has both shift_factor and latents_mean, which are two ways to say "
            "what is subtracted from latents; keep one"
        )


def check_channels(unet: Mapping[str, Any], vae: Mapping[str, Any], where: str) -> None:
    """Raise a `BackboneError` unless a denoiser takes the latents of a VAE, and nothing else.

    Args:
        unet: Config of the denoiser, with its class.
        vae: Config of the VAE.
        where: Name of the model, for messages.
    """
    if layout_of(unet) is not None:
        takes, gives = latent_channels(unet), vae.get("latent_channels", 4)
        if takes != gives:
            raise BackboneError(
                f"the VAE of {where} gives {gives} channels and the transformer takes {takes}; "
                "they belong to different models"
            )
        return
    takes, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if takes != latents:
        kind = INPUTS.get(takes) if latents == 4 else None
        raise BackboneError(
            f"{where} is {kind}: its U-Net takes {takes} channels, of which the VAE gives 4; "
            "diffenc reads models that see a picture's latents alone"
            if kind
            else f"the VAE of {where} gives {latents} channels and the U-Net takes {takes}; they "
            "belong to different models"
        )
    if unet.get("out_channels", 4) != takes:
        raise BackboneError(
            f"the U-Net of {where} has out_channels={unet.get('out_channels', 4)} and "
            f"in_channels={takes}; it must predict as many as it takes"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
