"""State dicts from safetensors files or from the caller, and models made of them."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffenc.errors import BackboneError
from diffenc.truncation import truncate

State = Mapping[str, Tensor]

LDM_UNET = "input_blocks.0.0.weight"
_DIFFUSERS_UNET = "conv_in.weight"


def read_state(source: "str | os.PathLike[str] | State") -> dict[str, Tensor]:
    """The weights of a `.safetensors` file, or those given, by name.

    Raises:
        BackboneError: No such file, another format, or a broken one.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if not path.is_file():
        raise BackboneError(f"no such weights file: {path}")
    if path.suffix != ".safetensors":
        raise BackboneError(
            f"{path} is no .safetensors file, the one format of weights that diffenc reads: "
            "others can run code when they are opened. Convert it first."
        )
    try:
        with safe_open(path, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError is no subclass of a builtin
        raise BackboneError(f"cannot load {path}: {error}") from error


def unet_state(source: "str | os.PathLike[str] | State", config: dict[str, Any]) -> State:
    """Weights of a U-Net under diffusers' names, whatever stands before or beside them.

    The prefix is found by the first convolution ("unet.", "module.", "model.diffusion_model." ...);
    weights outside of it are left alone. The original layout (`input_blocks...`) is converted.

    Args:
        source: File or state dict.
        config: Of the `UNet2DConditionModel` that they belong to.

    Raises:
        BackboneError: No U-Net among them, or several.
    """
    state = read_state(source)
    found = [
        (key.removesuffix(first), first)
        for first in (_DIFFUSERS_UNET, LDM_UNET)
        for key in state
        if key == first or key.endswith("." + first)
    ]
    label = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
    # VAEs have a conv_in of their own, inside an encoder and a decoder.
    found = [
        (prefix, first)
        for prefix, first in found
        if f"{prefix}time_embedding.linear_1.weight" in state
        or f"{prefix}time_embed.0.weight" in state
    ]
    if len(found) != 1:
        what = "no U-Net" if not found else f"several U-Nets, under {[p for p, _ in found]}"
        raise BackboneError(
            f"{label} holds {what}; expected is {_DIFFUSERS_UNET!r} or {LDM_UNET!r} once, with or "
            f"without a prefix. Its first names are {sorted(state)[:3]}."
        )
    prefix, first = found[0]
    own = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
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


def load_into(
    build: Callable[[], nn.Module], state: State, *, what: str, dtype: torch.dtype
) -> Any:
    """A model in evaluation mode with exactly these weights; nothing is allocated beside them.

    Args:
        build: Makes the model; called on the meta device.
        state: By the model's names; what it does not have is refused.
        what: Of the model, for messages.
        dtype: Floating weights are brought to it.

    Raises:
        BackboneError: A weight is missing, unknown, or of another shape.
    """
    with torch.device("meta"):
        model = build()
    check_state(model, state, what=what)
    cast = {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()
    }
    model.load_state_dict(cast, assign=True, strict=False)
    for module in model.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:  # in no file: they count
            places = torch.arange(ids.shape[-1]).expand(1, -1)
            module.register_buffer("position_ids", places, persistent=False)
    return model.eval()


def check_state(model: nn.Module, state: State, *, what: str) -> None:
    """Raise a `BackboneError` that names the first weight that does not fit a model."""
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    for name, shape in wanted.items():
        if name in state and state[name].shape != shape:
            raise BackboneError(
                f"{what} does not fit this model: {name!r} is {tuple(state[name].shape)}, needed "
                f"is {tuple(shape)}; is it made for another backbone?"
            )
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        counts = [
            f"{verb} {len(names)} weights, such as {names[0]!r}"
            for verb, names in (("lacks", missing), ("has unknown", unknown))
            if names
        ]
        raise BackboneError(f"{what} {' and '.join(counts)}")


def load_unet(
    config: dict[str, Any],
    state: State,
    *,
    what: str,
    dtype: torch.dtype,
    keep_taps: Sequence[str] | None = None,
) -> Any:
    """A U-Net with these weights, all of it or up to the last tap.

    Args:
        config: Of a `UNet2DConditionModel`.
        state: Under diffusers' names.
        what: The source of the weights, for messages.
        dtype: Of the weights.
        keep_taps: Module paths; what lies behind the last of them is dropped. None keeps all.

    Raises:
        BackboneError: A weight is missing, unknown, or of another shape.
    """
    from diffusers import UNet2DConditionModel

    def whole() -> nn.Module:
        unet: nn.Module = UNet2DConditionModel.from_config(config)
        return unet

    if keep_taps is None:
        return load_into(whole, state, what=what, dtype=dtype)
    with torch.device("meta"):
        known = set(whole().state_dict())
        wanted = set(truncate(whole(), keep_taps).state_dict())
    # What was cut off may be there, and anything else may not.
    part = {key: state[key] for key in state if key in wanted or key not in known}
    return load_into(lambda: truncate(whole(), keep_taps), part, what=what, dtype=dtype)
