"""Causal language models of transformers: loaded by name, and what they can hold."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffenc.errors import BackboneError, ConfigError
from diffenc.models.device import as_dtype
from diffenc.runtime.defaults import torch_defaults
from diffenc.runtime.inference import lasting
from diffenc.runtime.threads import without_warnings
from diffenc.storage.pretrained import (
    lasting_name,
    load_whole,
    loading,
    model_folder,
    pretrained_source,
)
from diffenc.storage.remote_code import refuse_remote_code
from diffenc.storage.weights import StoredWeights

_INSTEAD = (
    "Pass a folder with config.json, safetensors and a tokenizer, or the Hub id of a causal "
    "language model"
)


@lasting
def load_language_model(
    name: "str | os.PathLike[str]",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        name: Name of the model: a folder, a Hub id such as ``"lmsys/vicuna-7b-v1.5"``, or
            "shapes-lm", the bundled miniature.
        device: Device of the model.
        dtype: Floating point type of the weights, or its name.

    Raises:
        BackboneError: There is no such model.
        ConfigError: Another dtype.
    """
    import transformers

    label, kind = os.fspath(name), as_dtype(dtype)
    with loading("a language model", label, instead=_INSTEAD):
        tokenizer = load_tokenizer(name)
        model = load_whole(transformers.AutoModelForCausalLM, name, dtype=kind)
    model.name_or_path = lasting_name(name)
    return model.to(device), tokenizer


def load_tokenizer(name: "str | os.PathLike[str]") -> Any:
    """The tokenizer of a language model; nothing of the model itself is loaded.

    Raises:
        BackboneError: It asks for code to be run.
        Exception: The libraries' own, where there is none.
    """
    from transformers import AutoTokenizer

    folder = model_folder(name, weights=False)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def bundled_language_model() -> str:
    """Folder of the miniature "shapes-lm".

    Raises:
        BackboneError: This version has none.
    """
    return pretrained_source("shapes-lm")


def context_of(language_model: Any) -> int | None:
    """How many tokens a language model holds; None where its config does not say."""
    config = language_model.config
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def filler_id(tokenizer: Any) -> int:
    """What stands behind an answer that ended before others of its batch.

    Raises:
        ConfigError: The tokenizer has neither a pad token nor an end of sequence.
    """
    for name in ("pad_token_id", "eos_token_id"):
        token_id = getattr(tokenizer, name, None)
        if isinstance(token_id, int):
            return token_id
    raise ConfigError(
        "the tokenizer has neither a pad token nor an end-of-sequence token; set "
        "tokenizer.pad_token to a token that texts do not use"
    )


def ends_of(generation_config: Any, tokenizer: Any) -> list[int] | None:
    """Tokens that end an answer: the config's, and the tokenizer's, which templates write."""
    own = generation_config.eos_token_id
    ends = own if isinstance(own, (list, tuple)) else [own]
    known = (token for token in (*ends, tokenizer.eos_token_id) if token is not None)
    return list(dict.fromkeys(known)) or None


def width_of(language_model: Any) -> int:
    """Channels of a token's embedding."""
    embedding: Any = language_model.get_input_embeddings()
    width: int = embedding.weight.shape[1]
    return width


@lasting
def add_language_lora(
    language_model: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0
) -> Any:
    """A language model with a low-rank adapter on every linear layer but the last.

    Raises:
        ConfigError: There is an adapter already, or a value is out of range.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(language_model, PeftModel):
        raise ConfigError("this language model has a LoRA adapter already; one is enough")
    if rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        raise ConfigError(
            f"LoRA takes rank >= 1, alpha > 0 and dropout in [0, 1), got {rank}, {alpha}, {dropout}"
        )
    options = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # an int by its annotation alone
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    # peft asks transformers by an old name.
    with torch_defaults(), without_warnings(category=FutureWarning):
        adapted = get_peft_model(language_model, options)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted.train(language_model.training)


def open_language_lora(folder: Path) -> StoredWeights:
    """The weights of a language model's LoRA adapter; peft would take pickled ones too.

    Raises:
        BackboneError: There is no whole `.safetensors` file of them.
    """
    refuse_remote_code(folder)
    return StoredWeights({folder / "adapter_model.safetensors": None}, where=str(folder))


def open_language_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a language model's LoRA adapter.

    Raises:
        BackboneError: There is none.
    """
    from transformers import AutoTokenizer

    with loading("a tokenizer", str(folder), instead="Save the model again."):
        refuse_remote_code(folder)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def check_language_lora(language_model: Any, weights: StoredWeights) -> None:
    """Raise unless an adapter that peft has loaded is the one in its files.

    peft lets weights be missing, which are random then, and passes over those without a place.

    Raises:
        BackboneError: They differ.
    """
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(language_model)
    strange = sorted(own.keys() ^ weights.keys()) or [
        name
        for name, value in own.items()
        if not torch.equal(value.cpu(), weights[name].to(value.dtype))
    ]
    if strange:
        raise BackboneError(
            f"{weights.where} holds no whole LoRA adapter of this language model: it differs in "
            f"{len(strange)} weights, such as {strange[0]!r}"
        )
