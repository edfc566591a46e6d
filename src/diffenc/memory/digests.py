"""Digests and marks that recognise the same model in other processes and on other days."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffenc.inputs.noise import signal_levels
from diffenc.inputs.tokenizing import prompt_ids

Mark = Mapping[str, list[float]]
"""A few numbers of the weights, or the settings, of each part of a model, by the part's name."""

_OTHER = 0.02
_SAMPLE = 4096
_WEIGHTS = 6
_LEVELS = 16
_FINE = 1000.0
_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_PROBE = "a photo of the thumbnail, 12 left"
_PART_OF_NONE = ("up_blocks.", "conv_norm_out.", "conv_out.", "proj_out.")
_LATER_BLOCK = re.compile(r"single_transformer_blocks\.|transformer_blocks\.[1-9]")
_CORE = frozenset(vars(nn.Module()))
_PASSING = frozenset(
    {
        "_commit_hash",
        "_compile_options",
        "_is_hf_initialized",
        "_matched",
        "_name_or_path",
        "_waiting",
        "architectures",
        "compiled",
        "dtype",
        "replacements",
        "gradient_checkpointing",
        "lock",
        "name",
        "name_or_path",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Attributes that have no effect on results."""


def full_digest(module: nn.Module) -> str:
    """A digest of every setting and every value of a module, whatever it was loaded from.

    It is the same in other processes; all weights are read, a gigabyte in about two seconds.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path, each in module.named_modules():
        settings = {key: value for key, value in vars(each).items() if key not in _CORE}
        digest.update(f"{path} {type(each).__qualname__} {_text(settings)}".encode())
        for name, tensor in (*each._parameters.items(), *each._buffers.items()):
            if tensor is not None:
                digest.update(f"{path}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                _add(digest, tensor)
    return digest.hexdigest()


def adapters_in_use(module: nn.Module) -> str:
    """Names and scales of peft's adapters that are in use, layer by layer; "" without any adapter.

    They decide results and stand in no weight.
    """
    lines = []
    for path, layer in module.named_modules():
        if hasattr(layer, "lora_A"):
            adapted: Any = layer
            names = [] if adapted.disable_adapters else list(adapted.active_adapters)
            scales = {name: adapted.scaling.get(name) for name in names}
            lines.append(f"{path} {scales} {adapted.merged_adapters}")
    return "\n".join(lines)


def weights_mark(module: nn.Module) -> list[float]:
    """Numbers by which a model is known again: of some of its weights, in any floating dtype.

    Size and one projection of each, in units in which rounding to half precision moves them by
    about 0.001, and other weights by more than 0.02. Adapters change none of them, merged or not,
    nor does cutting off what lies behind a U-Net's last tap.
    """
    known = list(_lasting(module))
    step = max(1, (len(known) - 1) // (_WEIGHTS - 1))
    numbers = []
    for weight in known[::step][:_WEIGHTS]:
        flat = weight.detach().flatten()
        values = flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE].cpu().double()
        pattern = torch.cos(torch.arange(len(values), dtype=torch.float64, device="cpu"))
        size, unit = float(values.norm()), math.sqrt(len(values))
        along = float(values @ pattern) / (size * float(pattern.norm()) or 1.0)
        numbers += [round(unit * math.log(size or 1.0), 6), round(unit * along, 6)]
    return numbers


def is_marked(module: nn.Module, mark: object) -> bool:
    """Whether a model is the one that a mark was made of."""
    return is_alike(weights_mark(module), mark)


def is_alike(own: Sequence[float], mark: object) -> bool:
    """Whether two marks are of the same thing."""
    if not isinstance(mark, (list, tuple)) or len(mark) != len(own):
        return False
    return all(
        isinstance(value, (int, float)) and abs(value - now) <= _OTHER
        for value, now in zip(mark, own, strict=True)
    )


def schedule_mark(scheduler: Any) -> list[float]:
    """Numbers of a noise schedule: its length, some of its levels, and what is predicted."""
    levels = signal_levels(scheduler).double().tolist()
    kind = str(getattr(scheduler.config, "prediction_type", None))
    step = max(1, len(levels) // _LEVELS)
    some = [round(_FINE * level, 6) for level in (*levels[::step], levels[-1])]
    return [float(len(levels)), _number(kind), *some]


def scaling_mark(config: Mapping[str, Any]) -> list[float]:
    """Numbers by which a VAE's latents are scaled."""
    values: list[float] = []
    for name in _SCALING:
        value = config.get(name)
        numbers = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        values += [float(len(numbers)), *(round(_FINE * float(each), 6) for each in numbers)]
    return values


def words_mark(tokenizer: Any) -> list[float]:
    """Numbers of what a tokenizer makes of a text: limit, padding, turns, and ids of one."""
    pad = tokenizer.pad_token_id
    template = _number(str(getattr(tokenizer, "chat_template", None)))
    known = (len(tokenizer), tokenizer.model_max_length, -1 if pad is None else pad, template)
    return [float(number) for number in (*known, *prompt_ids(tokenizer, [_PROBE])[0])]


def _number(word: str) -> float:
    return float(int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big"))


def _lasting(module: nn.Module) -> Iterator[Tensor]:
    """Matrices as they are without adapters, those left out that shortening cuts, in order."""
    for path, parameter in module.named_parameters():
        cut = path.startswith(_PART_OF_NONE) or _LATER_BLOCK.match(path) is not None
        if parameter.ndim > 1 and not cut and ".lora_" not in path:
            yield _without_adapters(module, path, parameter)


def _without_adapters(module: nn.Module, path: str, weight: Tensor) -> Tensor:
    layer, base, _ = path.rpartition(".base_layer.weight")
    adapted: Any = module.get_submodule(layer) if base else None
    for name in getattr(adapted, "merged_adapters", ()):
        weight = weight - adapted.get_delta_weight(name).to(weight)
    return weight


def _add(digest: Any, tensor: Tensor) -> None:
    flat = tensor.detach().flatten()
    for part in flat.split(2**24):  # keeps copies from a GPU small
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy())


def _text(value: Any, depth: int = 8) -> str:
    """A value in words that are the same in every process; identities are left out."""
    if isinstance(value, Tensor):
        digest = hashlib.blake2b(digest_size=16)
        _add(digest, value)
        return f"{tuple(value.shape)} {value.dtype} {digest.hexdigest()}"
    if isinstance(value, (str, bytes, bool, int, float, type(None), torch.dtype)):
        return repr(value)
    if isinstance(value, Mapping):
        entries = ((key, entry) for key, entry in value.items() if key not in _PASSING)
        inner = sorted(f"{key!s}: {_text(entry, depth - 1)}" for key, entry in entries)
        return f"{{{', '.join(inner)}}}" if depth else "..."
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_text, value)))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(entry, depth - 1) for entry in value)}]" if depth else "..."
    if callable(getattr(value, "get_vocab", None)):
        return _tokenizer_text(value)
    inside = getattr(value, "__dict__", None)
    if is_dataclass(value):  # one with slots has no __dict__
        inside = {field.name: getattr(value, field.name) for field in fields(value)}
    name = type(value).__qualname__
    plain = not isinstance(value, type) and not callable(getattr(value, "__code__", None))
    if isinstance(value, nn.Module) or not inside or not plain or not depth or name in _STORES:
        return getattr(value, "__qualname__", name)
    return f"{name} {_text(inside, depth - 1)}"


_STORES = ("Caches", "TensorCache", "RLock", "Logger")


def _tokenizer_text(tokenizer: Any) -> str:
    settings = (
        tokenizer.model_max_length,
        getattr(tokenizer, "padding_side", None),
        getattr(tokenizer, "truncation_side", None),
        {key: str(token) for key, token in getattr(tokenizer, "special_tokens_map", {}).items()},
        {key: repr(token) for key, token in getattr(tokenizer, "added_tokens_decoder", {}).items()},
        tokenizer.get_vocab(),
    )
    core = getattr(tokenizer, "backend_tokenizer", None)
    steps = () if core is None else (core.normalizer, core.pre_tokenizer, core.post_processor)
    words = [None if step is None else step.__getstate__() for step in steps]
    return _text([*settings, *words])
