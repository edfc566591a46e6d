"""Parts that the caller gives in place of a model's own: a denoiser, a VAE, text encoders."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffenc.checks.arguments import is_wide, whole
from diffenc.denoiser.shortening import shortened
from diffenc.errors import BackboneError
from diffenc.models.config_checks import check_config
from diffenc.models.configs import Architecture
from diffenc.models.denoisers import config_of
from diffenc.models.family_files import classes_of
from diffenc.models.part_checks import check_weights
from diffenc.models.statements import Statements
from diffenc.models.stored import (
    load_stored,
    load_vae,
    read_plain,
    read_vae_config,
)
from diffenc.models.weights import State, load_denoiser, read_state, unet_state
from diffenc.runtime.precision import cast, fitting_dtype
from diffenc.storage.names import checked_path, is_file, is_folder, printable
from diffenc.storage.pretrained import absolute
from diffenc.storage.reading import read_json, read_text, text_lines
from diffenc.storage.remote_code import refuse_remote_code


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenParts:
    """What `load_backbone` takes in place of a model's own parts; None leaves the model's.

    Modules are used as they are: moved, cast, frozen and put into evaluation mode, not copied.

    Attributes:
        unet: A `UNet2DConditionModel`, a state dict, or a `.safetensors` file, under diffusers'
            names or the original ones, with or without a prefix.
        transformer: A diffusion transformer of the class that the model has, or the folder of one.
        vae: An `AutoencoderKL` or `AutoencoderTiny` (TAESD), the folder of one, or a
            `.safetensors` file that fits the model's own VAE.
        text_encoder: A `CLIPTextModel`, or the folder of one.
        text_encoder_2: Second text encoder of SDXL: a `CLIPTextModelWithProjection`, or the folder
            of one.
        tokenizer: A `CLIPTokenizer`, or the folder of one.
        tokenizer_2: Tokenizer of SDXL's second text encoder, or the folder of one.
    """

    unet: Any = None
    transformer: Any = None
    vae: Any = None
    text_encoder: Any = None
    text_encoder_2: Any = None
    tokenizer: Any = None
    tokenizer_2: Any = None

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if isinstance(value, (str, os.PathLike)):
                checked_path(name, value, error=BackboneError)
            elif value is not None and not _is_part(name, value):
                raise BackboneError(f"{name} must be a model or a path, got {type(value).__name__}")

    def references(self) -> dict[str, str | None]:
        """Path of each part that is given, None for one that is an object."""
        return {
            field.name: absolute(value) if _is_path(value) else None
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }

    def described(self, described: Architecture) -> Architecture:
        """A model's configs, with those of the denoiser and the VAE that are given as modules.

        Raises:
            BackboneError: The denoiser that is given is of the other kind, or of another class.
        """
        configs = {"vae": dict(self.vae.config)} if hasattr(self.vae, "config") else {}
        for name, word, own in (
            ("unet", "a U-Net", "a transformer: pass transformer="),
            ("transformer", "a transformer", "a U-Net: pass unet="),
        ):
            if getattr(self, name) is not None and described.denoiser != name:
                raise BackboneError(f"{name}= replaces {word}, and this model has {own}")
        if hasattr(self.unet, "config"):
            configs["unet"] = dict(self.unet.config)
        if hasattr(self.transformer, "config"):
            configs["transformer"] = config_of(self.transformer)
        if _is_path(self.transformer):
            configs["transformer"] = self._transformer_config(described.family)
        if _is_path(self.vae) and is_folder(self.vae):
            configs["vae"] = read_vae_config(_subfolder(Path(self.vae), "vae"))
        return replace(described, configs={**described.configs, **configs})

    def _transformer_config(self, family: str) -> dict[str, Any]:
        folder = _subfolder(Path(self.transformer), "transformer")
        values = read_plain(folder / "config.json")
        return check_config(values, "transformer", os.fspath(self.transformer), family)

    def statements(self) -> Statements | None:
        """What the given weights of a U-Net say of themselves; None where they are none.

        Raises:
            BackboneError: A model whose noise is no schedule of steps, or a broken file.
        """
        if isinstance(self.unet, Mapping):
            return Statements.read(self.unet, {}, "the given U-Net")
        if not _is_path(self.unet) or not is_file(self.unet):
            return None
        try:
            with safe_open(self.unet, framework="pt") as opened:
                names, metadata = opened.keys(), opened.metadata() or {}
        except Exception:  # refused with reasons when the weights are read
            return None
        return Statements.read(names, metadata, os.fspath(self.unet))

    def load(
        self,
        name: str,
        described: Architecture,
        *,
        dtype: torch.dtype,
        keep_taps: Sequence[str] | None,
    ) -> Any:
        """The part of that name, or None where it is not given.

        Args:
            name: Name of the attribute that holds the part, such as "vae".
            described: Configs of the model that the part goes to.
            dtype: Floating point type of the part's weights; a VAE that overflows in float16 is put
                in float32.
            keep_taps: Module paths of the U-Net; what lies behind the last of them is left out.
                None keeps all.

        Raises:
            BackboneError: It cannot be read, or does not fit.
        """
        replacement = getattr(self, name, None)
        if replacement is None:
            return None
        if name.startswith("tokenizer"):
            classes = classes_of(name, described.family)
            if _is_path(replacement):
                return load_tokenizer(replacement, classes=classes)
            return replacement
        if isinstance(replacement, nn.Module):
            check_weights(replacement, f"the given {name}")  # a cast would hide what they were
            return cast(
                replacement
                if keep_taps is None or name not in ("unet", "transformer")
                else shortened(replacement, keep_taps),
                dtype,
            )
        if name == "unet":
            state = unet_state(replacement, described.configs["unet"])
            what = "the given U-Net"
            return load_denoiser(
                described.configs["unet"], state, what=what, dtype=dtype, keep_taps=keep_taps
            )
        if not _is_path(replacement):
            raise BackboneError(
                f"{name} must be a model or a path, got {type(replacement).__name__}"
            )
        if name == "vae":
            return _load_vae(Path(replacement), described.configs["vae"], dtype)
        folder = _subfolder(Path(replacement), name)
        return load_stored(folder, name, dtype, keep_taps=keep_taps, family=described.family)[0]


def _is_part(name: str, value: object) -> bool:
    """Whether an object can stand for a part: a module, a tokenizer, or weights of a U-Net."""
    if name.startswith("tokenizer"):
        return callable(value) and hasattr(value, "model_max_length")
    if name == "unet" and isinstance(value, Mapping):
        return all(isinstance(weight, Tensor) for weight in value.values())
    return isinstance(value, nn.Module)


def _is_path(value: object) -> bool:
    return isinstance(value, (str, os.PathLike))


def _subfolder(folder: Path, part: str) -> Path:
    """The part's folder within a model's, or the folder itself where it is the part's."""
    if not is_folder(folder):
        raise BackboneError(f"no such folder for {part}: {folder}")
    return folder / part if is_folder(folder / part) else folder


def _load_vae(path: Path, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """From the folder of a VAE, or from a file that fits the model's own."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    if path.suffix == ".safetensors" and not is_folder(path):
        state = read_state(path)
        if any(".mid.block_1." in name for name in state):
            state = _converted(convert_ldm_vae_checkpoint, state, config, path)
        config = {**config, "_class_name": "AutoencoderKL"}
        return load_vae(config, state, what=str(path), dtype=fitting_dtype(config, dtype))
    return load_stored(_subfolder(path, "vae"), "vae", dtype)[0]


def _converted(convert: Any, state: State, config: dict[str, Any], path: Path) -> State:
    try:
        converted: State = convert(dict(state), config)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise BackboneError(f"{path} holds no whole VAE in the original layout: {error}") from error
    return converted


def load_tokenizer(
    folder: "str | os.PathLike[str]",
    name: str = "tokenizer",
    *,
    classes: Sequence[str] = ("CLIPTokenizer",),
) -> Any:
    """A tokenizer from its folder, or from that of a model.

    Args:
        folder: Folder of the tokenizer, or of the model.
        name: Name of the part.
        classes: Classes that it may be of; the first is taken.

    Raises:
        BackboneError: It cannot be read.
    """
    import transformers

    path = _subfolder(Path(folder), name)
    refuse_remote_code(path)
    kind: Any = getattr(transformers, classes[0])
    if not is_file(path / "tokenizer.json"):
        if classes[0].startswith("CLIP"):
            _check_words(path)
        elif not any(is_file(path / file) for file in _PIECES):
            raise BackboneError(
                f"{path} holds no tokenizer: neither tokenizer.json nor {' or '.join(_PIECES)}"
            )
    try:
        return kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise BackboneError(f"cannot load {path}: {error}") from error


_PIECES = ("spiece.model", "tokenizer.model")
"""Files of SentencePiece, by which T5 and Gemma are published."""


def _check_words(folder: Path) -> None:
    """Raise where a tokenizer lacks its words, or merges that make them: texts would be spelt."""
    lacking = [name for name in ("vocab.json", "merges.txt") if not is_file(folder / name)]
    if len(lacking) == 2:
        raise BackboneError(f"{folder} holds no tokenizer: neither vocab.json nor tokenizer.json")
    if lacking:
        raise BackboneError(f"{folder} holds no whole tokenizer: it lacks {lacking[0]}")
    words = read_json(folder / "vocab.json", error=BackboneError)
    lines = text_lines(read_text(folder / "merges.txt", error=BackboneError))
    made = {line.replace(" ", "") for line in lines}
    spelt = [
        word
        for word in words
        if len(word.removesuffix("</w>")) > 1 and word not in made and not word.startswith("<|")
    ]
    if spelt:
        raise BackboneError(
            f"{folder} holds no whole tokenizer: no line of merges.txt makes {len(spelt)} words of "
            f"vocab.json, such as {printable(repr(spelt[0]), 60)}"
        )


def fitting_tokenizer(tokenizer: Any, text_encoder: Any, pad_token: str | None = None) -> Any:
    """The tokenizer, or a copy of it that knows the encoder's limit and the padding it learnt.

    Args:
        tokenizer: Tokenizer to fit, a `CLIPTokenizer`.
        text_encoder: Text encoder, whose `config` tells how many tokens it reads.
        pad_token: Token that the model was trained to pad with; None is the tokenizer's own.
    """
    longest = tokenizer.model_max_length
    unlimited = is_wide(longest) and longest > 0  # 10**30 in transformers
    if not unlimited:
        whole("model_max_length of the tokenizer", longest, least=1, error=BackboneError)
    limit = getattr(text_encoder.config, "max_position_embeddings", longest)
    pad_token = tokenizer.pad_token if pad_token is None else pad_token
    if tokenizer.model_max_length <= limit and tokenizer.pad_token == pad_token:
        return tokenizer
    fitting = copy.deepcopy(tokenizer)
    fitting.model_max_length = min(limit, tokenizer.model_max_length)
    fitting.pad_token = pad_token
    return fitting
