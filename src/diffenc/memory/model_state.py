"""A key of what a module's results depend on beside its input.

Caches are right only if their keys change with everything that changes a result: weights and
buffers, written or exchanged, submodules, settings, attention processors, adapters, and how torch
computes. A module is therefore walked once, slowly, and what was found is compared with what is
there whenever a key is needed, fast. Each state gets a number that is never given again.

Nothing here keeps a model alive: objects are watched through weak references, whose death says that
an identity may come back as that of something else.
"""

import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

from diffenc.inputs.noise import signal_levels
from diffenc.memory.object_watch import object_key, watch_of


def state_key(module: Any) -> Hashable | None:
    """A key of a frozen module's state, or None where nothing may be cached.

    It changes with every write that autograd counts, with storage, device and dtype of parameters
    and buffers, with parameters, submodules, settings, configs, attention processors and adapters
    that are exchanged or changed, with functions and hooks that are put in, and with autocast and
    torch's settings of precision. Writes through `.data` are not seen, nor is what a hook itself
    reads: clear the cache after them.

    Args:
        module: Module, or another object, whose attributes decide its results.

    Returns:
        None if results may differ from call to call, or if changes cannot be seen: something is in
        training mode or requires a gradient, weights are quantised, sharded, or were made in
        inference mode.
    """
    state = module_key(module)
    return None if state is None else (state, torch_settings())


def module_key(module: Any) -> int | None:
    """Return the part of `state_key` that depends on the module alone, not on torch's settings."""
    return watch_of(module).state()


def structure_key(module: nn.Module) -> int:
    """A number that changes unless only weight values and `requires_grad` flags change.

    A compiled form of the module is valid as long as this number stays the same.
    """
    return watch_of(module).structure()


def torch_settings() -> Hashable:
    """Return all global settings of torch that can change the digits of a result."""
    return (
        tuple(torch_module._global_forward_hooks),
        tuple(torch_module._global_forward_pre_hooks),
        tuple(_autocast(kind) for kind in _DEVICES),
        _precision(),
        object_key(functional.scaled_dot_product_attention),  # programs put their own in its place
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.backends.mkldnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


_DEVICES = ("cpu", "cuda", "mps", "xpu")


def _autocast(kind: str) -> torch.dtype | None:
    """The dtype that autocast computes in on a kind of device, or None outside of it."""
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _precision() -> tuple[object, ...]:
    """Settings of matrix products and convolutions, under torch's newer names and its older."""
    matmul = torch.backends.cuda.matmul
    readers: tuple[Callable[[], object], ...] = (
        torch.get_float32_matmul_precision,
        lambda: matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: matmul.fp32_precision,
        lambda: torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        lambda: torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        lambda: torch.backends.mkldnn.conv.fp32_precision,  # type: ignore[attr-defined]
        lambda: matmul.allow_fp16_reduced_precision_reduction,
        lambda: matmul.allow_bf16_reduced_precision_reduction,
    )
    return tuple(map(_read, readers))


def _read(reader: Callable[[], object]) -> object:
    try:
        value = reader()
    except (AttributeError, RuntimeError, AssertionError):
        return None  # this version of torch has no such setting, or the other kind was used
    return value if isinstance(value, Hashable) else str(value)


def content_key(values: Tensor) -> bytes:
    """A digest of a tensor's shape, dtype and values."""
    digest = hashlib.blake2b(f"{tuple(values.shape)} {values.dtype}".encode(), digest_size=16)
    flat = values.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().tobytes())  # numpy knows no bfloat16
    return digest.digest()


def scheduler_key(scheduler: Any) -> Hashable:
    """The noise levels of a scheduler and what a model under it predicts."""
    levels = signal_levels(scheduler)
    config = getattr(scheduler, "config", None)
    return content_key(levels), str(getattr(config, "prediction_type", None))


def tokenizer_key(tokenizer: Any) -> Hashable | None:
    """A key of all that decides a tokenizer's ids: settings, special and added tokens, steps.

    Returns:
        None if the tokenizer splits words at random (dropout of merges).
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(getattr(core, "model", None), "dropout", None):
        return None
    plain = tuple(
        (name, value)
        for name, value in vars(tokenizer).items()
        if isinstance(value, (bool, int, float, str, type(None)))
    )
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = getattr(tokenizer, "special_tokens_map", {})
    return (
        object_key(tokenizer),
        plain,
        len(tokenizer),
        tuple((index, repr(token)) for index, token in added.items()),
        tuple((name, str(token)) for name, token in special.items()),
        None if core is None else _core_state(core),
    )


def _core_state(core: Any) -> Hashable:
    """Steps of a compiled tokenizer; of its vocabulary, how it cuts one word."""
    steps = (core.normalizer, core.pre_tokenizer, core.post_processor)
    states = tuple(None if step is None else bytes(step.__getstate__()) for step in steps)
    model = core.model
    settings = tuple(str(getattr(model, name, None)) for name in _MERGES)
    return states, settings, tuple(piece.id for piece in model.tokenize(_PROBE))


_PROBE = "thumbnail"
_MERGES = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
