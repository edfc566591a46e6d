"""Parts that the caller gives in place of a model's own: a U-Net, a VAE, text encoders."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffenc.backbones.configs import Architecture
from diffenc.backbones.weights import load_into, load_unet, read_state, unet_state
from diffenc.errors import BackboneError
from diffenc.truncation import truncate

_VAES = ("AutoencoderKL", "AutoencoderTiny")
_OVERFLOWS = "force_upcast"


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenParts:
    """What `load_backbone` takes in place of a model's own parts; None leaves the model's.

    Modules are used as they are: moved, cast, frozen and put into evaluation mode, not copied.

    Attributes:
        unet: A `UNet2DConditionModel`, a state dict, or a `.safetensors` file, under diffusers'
            names or the original ones, with or without a prefix.
        vae: An `AutoencoderKL` or `AutoencoderTiny` (TAESD), the folder of one, or a
            `.safetensors` file that fits the model's own VAE.
        text_encoder: A `CLIPTextModel`, or the folder of one.
        text_encoder_2: SDXL's second, a `CLIPTextModelWithProjection`, or the folder of one.
        tokenizer: A `CLIPTokenizer`, or the folder of one.
        tokenizer_2: SDXL's second.
    """

    unet: Any = None
    vae: Any = None
    text_encoder: Any = None
    text_encoder_2: Any = None
    tokenizer: Any = None
    tokenizer_2: Any = None

    def references(self) -> dict[str, str | None]:
        """Path of each part that is given, None for one that is an object."""
        return {
            field.name: str(Path(value).absolute()) if _is_path(value) else None
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }

    def described(self, told: Architecture) -> Architecture:
        """A model's configs, with those of the U-Net and the VAE that are given as modules."""
        modules = {"unet": self.unet, "vae": self.vae}
        configs = {
            name: dict(part.config) for name, part in modules.items() if hasattr(part, "config")
        }
        if _is_path(self.vae) and Path(self.vae).is_dir():
            configs["vae"] = _read_vae_config(_subfolder(Path(self.vae), "vae"))
        return replace(told, configs={**told.configs, **configs})

    def load(
        self, name: str, told: Architecture, *, dtype: torch.dtype, keep_taps: Sequence[str] | None
    ) -> Any:
        """The part of that name, or None where it is not given.

        Args:
            name: Of an attribute.
            told: Configs of the model that it goes to.
            dtype: Of its weights; a VAE that overflows in float16 is put in float32.
            keep_taps: See `load_unet`.

        Raises:
            BackboneError: It cannot be read, or does not fit.
        """
        given = getattr(self, name, None)
        if given is None:
            return None
        if name.startswith("tokenizer"):
            return load_tokenizer(given) if _is_path(given) else given
        if isinstance(given, nn.Module):
            return _cast(
                given if keep_taps is None or name != "unet" else truncate(given, keep_taps), dtype
            )
        if name == "unet":
            state = unet_state(given, told.configs["unet"])
            what = "the given U-Net"
            return load_unet(
                told.configs["unet"], state, what=what, dtype=dtype, keep_taps=keep_taps
            )
        if not _is_path(given):
            raise BackboneError(f"{name} must be a model or a path, got {type(given).__name__}")
        if name == "vae":
            return _load_vae(Path(given), told.configs["vae"], dtype)
        return load_text_encoder(_subfolder(Path(given), name), name, dtype)


def _is_path(value: object) -> bool:
    return isinstance(value, (str, os.PathLike))


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    config = getattr(module, "config", {})
    overflows = isinstance(config, Mapping) and config.get(_OVERFLOWS, False)
    return module.to(torch.float32 if overflows and dtype == torch.float16 else dtype)


def _subfolder(folder: Path, part: str) -> Path:
    """The part's folder within a model's, or the folder itself where it is the part's."""
    if not folder.is_dir():
        raise BackboneError(f"no such folder for {part}: {folder}")
    return folder / part if (folder / part).is_dir() else folder


def _read_vae_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"cannot read the VAE's config in {folder}: {error}") from error
    if config.get("_class_name") not in _VAES:
        raise BackboneError(
            f"{folder} holds a {config.get('_class_name')!r}; a VAE is one of {list(_VAES)}"
        )
    return config


def _load_vae(path: Path, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """From the folder of a VAE, or from a file that fits the model's own."""
    from diffusers import AutoencoderKL, AutoencoderTiny
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    if path.suffix == ".safetensors":
        state = read_state(path)
        if any(".mid.block_1." in name for name in state):
            state = convert_ldm_vae_checkpoint(state, config)
        vae = load_into(
            lambda: AutoencoderKL.from_config(config), state, what=str(path), dtype=torch.float32
        )
        return _cast(vae, dtype)
    folder = _subfolder(path, "vae")
    tiny = _read_vae_config(folder)["_class_name"] == "AutoencoderTiny"
    model = AutoencoderTiny if tiny else AutoencoderKL
    try:
        return _cast(model.from_pretrained(folder, local_files_only=True), dtype)
    except Exception as error:  # anything from OSError to SafetensorError
        raise BackboneError(f"cannot load {folder}: {error}") from error


def load_text_encoder(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """A text encoder from its folder; the second of SDXL has a projection.

    Raises:
        BackboneError: It cannot be read.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
    try:
        loaded: Any = model.from_pretrained(folder, local_files_only=True)
        return loaded.to(dtype)
    except Exception as error:  # anything from OSError to SafetensorError
        raise BackboneError(f"cannot load {folder}: {error}") from error


def load_tokenizer(folder: "str | os.PathLike[str]", name: str = "tokenizer") -> Any:
    """A tokenizer from its folder, or from that of a model.

    Raises:
        BackboneError: It cannot be read.
    """
    from transformers import CLIPTokenizer

    path = _subfolder(Path(folder), name)
    if not any((path / file).is_file() for file in ("vocab.json", "tokenizer.json")):
        raise BackboneError(f"{path} holds no tokenizer: neither vocab.json nor tokenizer.json")
    try:
        return CLIPTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise BackboneError(f"cannot load {path}: {error}") from error


def fitting_tokenizer(tokenizer: Any, text_encoder: Any, pad_token: str | None = None) -> Any:
    """The tokenizer, or a copy of it that knows the encoder's limit and the padding it learnt.

    Args:
        tokenizer: A `CLIPTokenizer`.
        text_encoder: Its `config` tells how many tokens it reads.
        pad_token: What the model was trained with; None is the tokenizer's own.
    """
    limit = getattr(text_encoder.config, "max_position_embeddings", tokenizer.model_max_length)
    pad_token = tokenizer.pad_token if pad_token is None else pad_token
    if tokenizer.model_max_length <= limit and tokenizer.pad_token == pad_token:
        return tokenizer
    fitting = copy.deepcopy(tokenizer)
    fitting.model_max_length = min(limit, tokenizer.model_max_length)
    fitting.pad_token = pad_token
    return fitting
