"""State dicts from safetensors files or from the caller, and models made of them."""

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffenc.denoiser.shortening import shortened
from diffenc.errors import BackboneError
from diffenc.models.denoisers import build_denoiser
from diffenc.models.part_checks import STORED, check_kinds
from diffenc.models.statements import MARKERS
from diffenc.runtime.precision import precise_layers
from diffenc.storage.names import is_file
from diffenc.storage.weights import StoredWeights, check_finite

State = Mapping[str, Tensor]

LDM_UNET = "input_blocks.0.0.weight"
_DIFFUSERS_UNET = "conv_in.weight"


def read_state(source: "str | os.PathLike[str] | State") -> State:
    """The weights of a `.safetensors` file, or those given, by name.

    Raises:
        BackboneError: No such file, another format, or a broken one; or something else is given
            than names and tensors.
    """
    if isinstance(source, Mapping):
        for name, value in source.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise BackboneError(
                    f"a state dict holds tensors by name, got {type(value).__name__} for {name!r}"
                )
        return dict(source)
    path = Path(source)
    if not is_file(path):
        raise BackboneError(f"no such weights file: {path}")
    if path.suffix != ".safetensors":
        raise BackboneError(
            f"{path} is no .safetensors file, the one format of weights that diffenc reads: "
            "others can run code when they are opened. Convert it first."
        )
    return StoredWeights({path: None}, where=str(path))


def unet_state(source: "str | os.PathLike[str] | State", config: dict[str, Any]) -> State:
    """Weights of a U-Net under diffusers' names, whatever stands before or beside them.

    The prefix is found by the first convolution ("unet.", "module.", "model.diffusion_model." ...);
    weights outside of it are left alone. The original layout (`input_blocks...`) is converted.

    Args:
        source: File that holds the weights, or a state dict.
        config: Config of the `UNet2DConditionModel` that the weights belong to.

    Raises:
        BackboneError: No U-Net among them, or several.
    """
    state = read_state(source)
    prefixes = [
        (key.removesuffix(first), first)
        for first in (_DIFFUSERS_UNET, LDM_UNET)
        for key in state
        if key == first or key.endswith("." + first)
    ]
    label = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
    # VAEs have a conv_in of their own, inside an encoder and a decoder.
    prefixes = [
        (prefix, first)
        for prefix, first in prefixes
        if f"{prefix}time_embedding.linear_1.weight" in state
        or f"{prefix}time_embed.0.weight" in state
    ]
    if len(prefixes) != 1:
        what = "no U-Net" if not prefixes else f"several U-Nets, under {[p for p, _ in prefixes]}"
        raise BackboneError(
            f"{label} holds {what}; expected is {_DIFFUSERS_UNET!r} or {LDM_UNET!r} once, with or "
            f"without a prefix. Its first names are {sorted(state)[:3]}."
        )
    prefix, first = prefixes[0]
    inner = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
    own = renamed(state, {name: key for name, key in inner.items() if name not in MARKERS})
    return own if first == _DIFFUSERS_UNET else convert_unet(own, config)


def convert_unet(state: State, config: dict[str, Any]) -> State:
    """A U-Net in the original layout, without prefix, under diffusers' names.

    Raises:
        BackboneError: A weight that the config asks for is missing.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    prefixed = {f"model.diffusion_model.{key}": value for key, value in state.items()}
    try:
        converted: State = convert_ldm_unet_checkpoint(prefixed, config)
    except KeyError as error:
        raise BackboneError(
            f"this U-Net does not fit the configs of the model: it lacks {error}; is it made for "
            "another backbone?"
        ) from error
    return converted


def renamed(state: State, names: Mapping[str, str]) -> State:
    """Some of the weights under other names; none of them is read.

    Args:
        state: Weights by name.
        names: Name of each weight in `state`, by its new name.
    """
    if isinstance(state, StoredWeights):
        return state.renamed(names)
    return {new: state[own] for new, own in names.items()}


def load_into(
    build: Callable[[], nn.Module],
    state: State,
    *,
    what: str,
    dtype: torch.dtype,
    fit: Callable[[State, Collection[str]], State] | None = None,
) -> Any:
    """A model in evaluation mode with exactly these weights; nothing is allocated beside them.

    Args:
        build: Function that makes the model; it is called on the meta device.
        state: Weights by the model's names; a weight that the model does not have is refused.
        what: Name of the model in messages.
        dtype: Floating point type that floating weights are brought to.
        fit: Function that renames the weights to the names of the model, which it gets.

    Raises:
        BackboneError: No such model can be built; or a weight is missing, unknown, of another
            shape, no floating number, NaN or infinite.
    """
    model = _on_meta(build, what)
    if fit is not None:
        state = fit(state, model.state_dict().keys())
    check_state(model, state, what=what)
    cast = {}
    layers = set(precise_layers(model)) if dtype == torch.float16 else ()
    precise = {path for path, layer in model.named_modules() if layer in layers}
    for name in state:
        value, kind = state[name], torch.float32 if name.rpartition(".")[0] in precise else dtype
        cast[name] = value.to(kind) if value.is_floating_point() else value
        check_finite(cast[name], name, what)
    model.load_state_dict(cast, assign=True, strict=False)
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:  # files hold once what layers share
        tie()
    _fill_positions(model)
    if left := [name for name, value in _tensors(model) if value.is_meta]:
        raise BackboneError(
            f"{what} lacks {len(left)} values that no file holds, such as {left[0]}"
        )
    return model.eval()


def _on_meta(build: Callable[[], nn.Module], what: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except BackboneError:
        raise
    except Exception as error:  # a config of nonsense fails in any way
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BackboneError(f"{what} cannot be built from its config: {lines[0]}") from error


def _fill_positions(model: nn.Module) -> None:
    """Make the buffers that stand in no file: they count, or say where a patch lies."""
    for module in model.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:
            places = torch.arange(ids.shape[-1], dtype=torch.long, device="cpu").expand(1, -1)
            module.register_buffer("position_ids", places, persistent=False)
        waves = getattr(module, "pos_embed", None)
        if type(module).__name__ == "PatchEmbed" and isinstance(waves, Tensor) and waves.is_meta:
            module.register_buffer("pos_embed", _sines(module, waves.shape), persistent=False)
        if isinstance(getattr(module, "inv_freq", None), Tensor):
            _make_frequencies(module)
        scale = getattr(module, "scalar_embed_scale", None)
        if scale is not None:  # of Gemma's words
            scale = torch.tensor(scale, dtype=torch.float32, device="cpu")
            module.register_buffer("embed_scale", scale, persistent=False)


def _make_frequencies(rotary: Any) -> None:
    """Make the buffers of a language model's rotary positions."""
    with torch.device("cpu"):
        if hasattr(rotary, "config"):
            made = type(rotary)(config=rotary.config)
        else:  # transformers 4.44
            made = type(rotary)(rotary.dim, rotary.max_position_embeddings, rotary.base)
    for name, value in made.named_buffers():
        rotary.register_buffer(name, value, persistent=False)


def _sines(patches: Any, shape: Sequence[int]) -> Float[Tensor, "1 n c"]:
    """What a `PatchEmbed` adds to its patches, (1 n c), as diffusers makes it."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    with torch.device("cpu"):
        waves: Tensor = get_2d_sincos_pos_embed(
            shape[2],
            math.isqrt(shape[1]),
            base_size=patches.base_size,
            interpolation_scale=patches.interpolation_scale,
            output_type="pt",
        )
    return waves.float()[None]


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def check_state(
    model: nn.Module, state: State, *, what: str, needed: Collection[str] | None = None
) -> None:
    """Raise a `BackboneError` that names the first weight that does not fit a model.

    Names, shapes and kinds of numbers are compared; no weight in a file is read.

    Args:
        model: Model, which may be on the meta device.
        state: Weights by the model's names.
        what: Source of the weights, for messages.
        needed: Names of the weights that may not be missing; None requires all of the model's.

    Raises:
        BackboneError: A weight is missing, unknown, of another shape, or no floating number.
    """
    expected = model.state_dict()
    kinds = {
        name: _kind(state, name)
        for name, value in expected.items()
        if name in state and value.is_floating_point()
    }
    check_kinds(kinds, what)
    for name, value in expected.items():
        if name not in state:
            continue
        shape = state.shape(name) if isinstance(state, StoredWeights) else tuple(state[name].shape)
        if shape != tuple(value.shape):
            raise BackboneError(
                f"{what} does not fit this model: {name!r} is {shape}, needed is "
                f"{tuple(value.shape)}; is it made for another backbone?"
            )
    missing = sorted(set(expected if needed is None else needed) - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    if missing or unknown:
        counts = [
            f"{verb} {len(names)} weights, such as {names[0]!r}"
            for verb, names in (("lacks", missing), ("has unknown", unknown))
            if names
        ]
        raise BackboneError(f"{what} {' and '.join(counts)}")


def _kind(state: State, name: str) -> str:
    """Type of a weight's numbers, as files name it: "F32", "F8_E4M3"."""
    if isinstance(state, StoredWeights):
        return state.dtype(name)
    dtype = state[name].dtype
    return STORED.get(dtype, str(dtype))


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")


def fit_diffusers(state: State, expected: Collection[str]) -> State:
    """Weights under the names that diffusers' models have today.

    Its first versions called the projections of the attention in VAEs otherwise.
    """
    names = {}
    for own in state:
        old = _OLD_NAME.fullmatch(own)
        new = f"{old[1]}.{_OLD_ATTENTION[old[2]]}.{old[3]}" if old else own
        names[new if new in expected and new not in state else own] = own
    return renamed(state, names)


def _with_shared_words(state: State) -> State:
    """Weights of a T5 with those of its words under both of their names."""
    known = [name for name in _SHARED_TEXT if name in state]
    names = {name: name for name in state if name not in _SHARED_TEXT}
    return renamed(state, {**names, **dict.fromkeys(_SHARED_TEXT, known[0])} if known else names)


_SHARED_TEXT = ("shared.weight", "encoder.embed_tokens.weight")

_BESIDE_TEXT = ("vision_model.", "visual_projection.", "logit_scale")


def fit_text_encoder(state: State, expected: Collection[str]) -> State:
    """Weights of a text encoder under the names of this version of transformers.

    `CLIPTextModel` lost the prefix "text_model." in transformers 5.6. The positions are no weights,
    and a file may hold a whole CLIP, or a projection that the model does not read. Files of a T5
    hold its words once, under one of two names.

    Raises:
        BackboneError: A weight is there twice, with the prefix and without.
    """
    if {*_SHARED_TEXT} <= {*expected}:
        return _with_shared_words(state)
    plain = {name.removeprefix("text_model."): name for name in expected}
    names: dict[str, str] = {}
    for own in state:
        bare = own.removeprefix("text_model.")
        beside = own.startswith(_BESIDE_TEXT) or own.endswith("embeddings.position_ids")
        if beside or (own == "text_projection.weight" and bare not in plain):
            continue
        new = plain.get(bare, own)
        if new in names:
            raise BackboneError(
                f"a text encoder's weights hold one of them twice: {names[new]!r} and {own!r}"
            )
        names[new] = own
    return renamed(state, names)


def load_denoiser(
    config: dict[str, Any],
    state: State,
    *,
    what: str,
    dtype: torch.dtype,
    keep_taps: Sequence[str] | None = None,
) -> Any:
    """A U-Net or a transformer with these weights, all of it or up to the last tap.

    Args:
        config: Config of the denoiser; one that names no class is a `UNet2DConditionModel`'s.
        state: Weights under diffusers' names.
        what: Source of the weights, for messages.
        dtype: Floating point type of the weights.
        keep_taps: Module paths; what lies behind the last of them is checked by its names, and
            neither read nor kept. None keeps all.

    Raises:
        BackboneError: A weight is missing, unknown, or of another shape.
    """
    denoiser = _on_meta(lambda: build_denoiser(config), what)
    state = fit_diffusers(state, denoiser.state_dict().keys())
    if keep_taps is not None:
        kept = shortened(denoiser, keep_taps)
        # One that was saved without what lies behind the last tap lacks that, and no more.
        check_state(denoiser, state, what=what, needed=kept.state_dict().keys())
        denoiser, state = kept, renamed(state, {name: name for name in kept.state_dict()})
    return load_into(lambda: denoiser, state, what=what, dtype=dtype)
