"""Whether the configs of a folder say what a model can be built of, before one is.

What a config leaves out takes a default in silence, and sizes without bounds take time without end:
both are refused here. Whether the weights fit is checked by `diffenc.models.weights`.
"""

import math
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from diffenc.denoiser.transformers import LAYOUTS
from diffenc.errors import BackboneError
from diffenc.models.family_files import classes_of
from diffenc.storage.names import StrPath, printable
from diffenc.storage.remote_code import refuse_named_code

_BLOCKS = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block")
_NEEDED = {
    "UNet2DConditionModel": (
        "in_channels",
        "cross_attention_dim",
        "attention_head_dim",
        "norm_num_groups",
        *_BLOCKS,
    ),
    "AutoencoderKL": ("latent_channels", "norm_num_groups", *_BLOCKS),
    "AutoencoderTiny": (
        "latent_channels",
        "encoder_block_out_channels",
        "decoder_block_out_channels",
        "num_encoder_blocks",
        "num_decoder_blocks",
    ),
    "clip_text_model": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "vocab_size",
        "hidden_act",
    ),
    "t5": ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size"),
    "gemma2": (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "vocab_size"),
    ),
    "AutoencoderDC": (
        "latent_channels",
        "encoder_block_out_channels",
        "decoder_block_out_channels",
    ),
    "scheduler": (),
    **{name: layout.needed for name, layout in LAYOUTS.items()},
}
_TEXT_KINDS: dict[str, dict[str, set[type]]] = {
    "clip_text_model": {
        **{key: {int} for key in (*_NEEDED["clip_text_model"], "projection_dim")},
        "hidden_act": {str},
        "layer_norm_eps": {float},
    },
    "t5": {
        **{key: {int} for key in (*_NEEDED["t5"], "relative_attention_num_buckets")},
        "feed_forward_proj": {str},
        "layer_norm_epsilon": {float},
    },
    "gemma2": {key: {int} for key in _NEEDED["gemma2"]},
}
_TEXT_CLASSES = {
    "CLIPTextModel": ("clip_text_model", "the text encoders of CLIP"),
    "CLIPTextModelWithProjection": ("clip_text_model", "the text encoders of CLIP"),
    "T5EncoderModel": ("t5", "those of T5"),
    "Gemma2Model": ("gemma2", "Gemma 2"),
}
"""Kind of the config of each class of text encoders, and what they are called."""

_RENAMED = {"Transformer2DModel": "PixArtTransformer2DModel"}
"""Classes whose models diffusers has given a class of their own since they were published."""
_SCHEDULER_KINDS: dict[str, set[type]] = {
    "num_train_timesteps": {int},
    "beta_start": {float},
    "beta_end": {float},
    "beta_schedule": {str},
    "prediction_type": {str},
    "trained_betas": {list, float},
    "rescale_betas_zero_snr": {bool},
}
_POSITIVE = {
    "sample_size",
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "encoder_block_out_channels",
    "decoder_block_out_channels",
    "layers_per_block",
    "transformer_layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "norm_num_groups",
    "scaling_factor",
    "num_train_timesteps",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
    "num_layers",
    "patch_size",
    "caption_channels",
    "d_model",
    "d_kv",
    "d_ff",
    "num_heads",
}
_MAY_BE_EMPTY = {"dual_attention_layers"}
_LARGEST, _LONGEST, _DEEPEST = 2**24, 64, 128


def check_config(
    config: dict[str, Any], part: str, folder: StrPath, family: str | None = None
) -> dict[str, Any]:
    """The config of a part, if a model that diffenc reads can be built of it.

    Args:
        config: Content of the part's JSON file.
        part: Name of the part, such as "unet", "vae", "scheduler" or "text_encoder_2".
        folder: Folder of the model, for messages.
        family: Family of the model; None for a part by itself, see
            `diffenc.models.family_files.classes_of`.

    Returns:
        The same values; for a whole CLIP, those of its text half.

    Raises:
        BackboneError: It is of another kind of model, lacks a value, has one of another type or
            beyond all bounds, or names code to be run.
    """
    refuse_named_code(config, f"{part} of {folder}")
    try:
        return _checked(dict(config), part, family)
    except ValueError as error:
        raise BackboneError(f"cannot build {part} of {folder} from its config: {error}") from error


def _checked(config: dict[str, Any], part: str, family: str | None) -> dict[str, Any]:
    kinds: dict[str, set[type]]
    if part == "scheduler":
        name, kinds = "scheduler", _SCHEDULER_KINDS
    elif part.startswith("text_encoder"):
        config, name = _text_config(config, classes_of(part, family)[0])
        kinds = _TEXT_KINDS[name]
    else:
        known = classes_of(part, family)
        name = config.get("_class_name", known[0])
        if name not in known:
            raise ValueError(f"it is of a {printable(name)}; diffenc reads {' or '.join(known)}")
        if name in _RENAMED:
            name = config["_class_name"] = _RENAMED[name]
        kinds = _kinds(name)
        if name == "AutoencoderTiny":
            config.setdefault("block_out_channels", config.get("decoder_block_out_channels"))
    if lacking := [key for key in _NEEDED[name] if key not in config]:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    for key, value in config.items():
        if key in kinds and value is not None:
            _check_value(key, value, kinds[key], most=100_000 if name == "scheduler" else _LARGEST)
    return config


def _text_config(config: dict[str, Any], known: str) -> tuple[dict[str, Any], str]:
    """A text encoder's config, and its kind.

    Args:
        config: Config of the text encoder.
        known: Class of the text encoder.
    """
    expected, named = _TEXT_CLASSES[known]
    kind = config.get("model_type", expected)
    is_clip = kind == "clip" and expected == "clip_text_model"
    if is_clip and isinstance(config.get("text_config"), dict):
        return dict(config["text_config"]), expected
    if kind != expected:
        raise ValueError(f"it is of a {printable(kind)}; diffenc reads {named} here")
    return config, expected


def _check_value(key: str, value: Any, kinds: set[type], *, most: int) -> None:
    """Raise a `ValueError` for a value of another type, or beyond all bounds."""
    shown = f"{key} must be {_in_words(kinds)}, got {printable(repr(value), 60)}"
    least = 0 if key in _MAY_BE_EMPTY else 1
    if isinstance(value, list) and (list not in kinds or not least <= len(value) <= 1000):
        raise ValueError(shown)
    if isinstance(value, list) and "beta" not in key and len(value) > _LONGEST:
        raise ValueError(f"{key} must have {_LONGEST} entries at most, got {len(value)}")
    counts = "layers" in key or "num_encoder_blocks" in key or "num_decoder_blocks" in key
    for leaf in _leaves(value):
        if not _fits(leaf, kinds):
            raise ValueError(shown)
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ValueError(f"{key} must be finite, got {leaf}")
        if isinstance(leaf, bool) or not isinstance(leaf, int | float):
            continue
        if key in _POSITIVE and leaf <= 0:
            raise ValueError(f"{key} must be positive, got {leaf}")
        if abs(leaf) > (_DEEPEST if counts else most):
            raise ValueError(f"{key} must be {_DEEPEST if counts else most} at most, got {leaf}")


def _fits(leaf: Any, kinds: set[type]) -> bool:
    if leaf is None:
        return True
    if isinstance(leaf, bool):
        return bool(kinds & {bool, float})  # diffusers has annotated switches as numbers
    if isinstance(leaf, int):
        return bool(kinds & {int, float})
    return isinstance(leaf, (float, str)) and type(leaf) in kinds


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def _kinds(name: str) -> dict[str, set[type]]:
    """Types that the arguments of a model of diffusers may have, by name."""
    import diffusers

    hints = get_type_hints(getattr(diffusers, name).__init__)
    kinds = {key: set(_plain_types(hint)) for key, hint in hints.items() if key != "return"}
    return {key: types for key, types in kinds.items() if types}


def _plain_types(hint: Any) -> Iterator[type]:
    if hint in (int, float, str, bool):
        yield hint
    if (getattr(hint, "__origin__", None) or hint) in (tuple, list):
        yield list
    for inner in get_args(hint):
        yield from _plain_types(inner)


def _in_words(kinds: set[type]) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        list: "a list",
    }
    return " or ".join(word for kind, word in names.items() if kind in kinds)
