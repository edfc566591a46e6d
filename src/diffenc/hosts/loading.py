"""Whether, where and how a tower may load its frozen encoder inside other people's programs."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError, ConfigError
from diffenc.fusion import FusedEncoder
from diffenc.hosts.spec import TowerSpec
from diffenc.models import TapInfo
from diffenc.runtime.defaults import torch_defaults


def builds_on_meta() -> bool:
    """Whether parameters made now have no memory, as while a host's `from_pretrained` builds."""
    module = nn.Module()
    module.register_parameter("probe", nn.Parameter(torch.empty(1)))
    parameter: Any = module.probe
    return bool(parameter.is_meta)


def is_host_config(args: object) -> bool:
    """Whether a tower's `args` are the config of a model that is being built around it.

    What is loaded there is initialised anew when the host is done.
    """
    return hasattr(args, "model_type")


def read_device_map(device_map: Any, current: torch.device) -> torch.device:
    """The one device that a device map leads a tower to.

    Args:
        device_map: Device map: None, "auto" or another word of accelerate's, a device, or a mapping
            of module names to devices, of which the first counts.
        current: Device that None stands for.

    Raises:
        ConfigError: It is none of these.
    """
    if isinstance(device_map, dict):
        device_map = next(iter(device_map.values()), None)
    if device_map is None:
        return current
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else current
        )
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device_map must lead to a device, got {device_map!r}: {error}"
        ) from error


def load_encoder(
    spec: TowerSpec, *, device: torch.device, dtype: torch.dtype
) -> DiffusionEncoder | FusedEncoder:
    """The frozen encoder of a spec.

    Raises:
        BackboneError: A model cannot be had, or is not as the spec's configs say.
        ConfigError: The options do not fit it.
    """
    # Hosts know sizes by the spec's configs, whatever the model itself takes by default.
    known = {"taps": tuple(tap.name for tap in spec.tap_infos), "size": spec.image_size}
    with without_zero3():
        encoder = DiffusionEncoder.from_pretrained(
            spec.model,
            device=device,
            dtype=dtype,
            truncate=spec.cut,
            **{**spec.encoder_config().to_dict(), **known},
        )
        if encoder.feature_info != spec.tap_infos:
            raise BackboneError(
                f"{spec.model!r} has other configs than the tower was made for: its taps are "
                f"{_listed(encoder.feature_info)}, and those of the tower {_listed(spec.tap_infos)}"
            )
        if spec.companion is None:
            return encoder
        return FusedEncoder(spec.companion.name, encoder, spec.how, grid=spec.grid)


def _listed(taps: Sequence[TapInfo]) -> str:
    return ", ".join(f"{tap.name} ({tap.channels} channels, 1/{tap.reduction})" for tap in taps)


@contextmanager
def without_zero3() -> Iterator[None]:
    """Load whole weights even where the host trains with ZeRO-3.

    While its global setting stands, transformers cuts every model that it loads into pieces, and
    those who load otherwise find weights of size 0.
    """
    with torch_defaults():  # one thread at a time builds models: the setting is the process's
        deepspeed: Any = sys.modules.get("transformers.integrations.deepspeed")
        holder = getattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
        config = None if holder is None else holder()
        if config is None:
            yield
            return
        deepspeed.unset_hf_deepspeed_config()
        try:
            yield
        finally:
            deepspeed.set_hf_deepspeed_config(config)
