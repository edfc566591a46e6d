"""A frozen encoder that its tower's host neither sees, casts, shards, re-initialises nor saves.

Hosts re-initialise what is in their module tree, count it, shard it and write it into every
checkpoint. The encoder therefore stands in a plain object, and follows its tower's moves and casts
by what these do to a probe.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffenc.errors import ConfigError
from diffenc.models.device import DTYPES, check_placement

Conversion = Callable[[Tensor], Tensor]


class HiddenEncoder:
    """Holder of an encoder, with the device and dtype that its tower was brought to.

    Before an encoder is there, moves and casts are noted for it.

    Args:
        dtype: Floating point type of the frozen model, whatever the host casts the tower to; None
            follows the host.

    Attributes:
        encoder: Encoder, a `DiffusionEncoder` or a `FusedEncoder`; None as long as nothing is
            loaded.
        device: Device that the encoder is on, or will be on.
        dtype: Floating point type that the encoder computes in, or will; float32 where the device
            lacks what the host asked for.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.encoder: Any = None
        self.device = torch.device("cpu")
        self.fixed = dtype
        self.dtype = dtype or torch.float32

    @property
    def is_loaded(self) -> bool:
        """Whether an encoder is there."""
        return self.encoder is not None

    def put(self, encoder: nn.Module) -> None:
        """Take an encoder in, and bring it to the noted device and dtype."""
        self.encoder = encoder
        self.place(self.device, self.dtype)

    def follow(self, convert: Conversion) -> None:
        """Do to the encoder what a conversion of the tower does to its tensors.

        Args:
            convert: Function that `nn.Module._apply` is given. Moves to the meta device are not
                followed.
        """
        probe = convert(torch.zeros(1, dtype=self.dtype, device=self.device))
        if probe.device.type != "meta":
            self.place(probe.device, probe.dtype)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Bring the encoder to a device, and to a dtype as far as that computes right.

        The weights of a trainable adapter are left alone: they are the tower's.
        """
        target = self.fixed or (dtype if dtype in DTYPES else self.dtype)
        self.device, self.dtype = device, _computable(device, target)
        if self.encoder is None:
            return
        with self.encoder.backbone.lock:
            self._bring(device)

    def _bring(self, device: torch.device) -> None:
        for path, module in self.encoder.named_modules():
            if ".lora_" in path:
                continue
            target = _safe_dtype(self.encoder, path, self.dtype)
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None:
                        kept = target if tensor.is_floating_point() else tensor.dtype
                        if (tensor.device, tensor.dtype) != (device, kept):
                            tensor.data = tensor.data.to(device, kept)
        self.encoder.clear_cache()


def adapt_dtype(convert: Conversion) -> Conversion:
    """A conversion for trainable adapters: what it does, but never to float16.

    In float16 an adapter does not survive Adam, and gradient scalers refuse it.
    """

    def adapted(tensor: Tensor) -> Tensor:
        probe = convert(torch.zeros(1, dtype=tensor.dtype, device=tensor.device))
        if probe.dtype != torch.float16 or not tensor.is_floating_point():
            return convert(tensor)
        return tensor.to(probe.device, torch.float32)

    return adapted


def _computable(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    try:
        check_placement(device, dtype)
    except ConfigError:
        return torch.float32
    return dtype


def _safe_dtype(encoder: Any, path: str, dtype: torch.dtype) -> torch.dtype:
    """Floating point type of a module; a VAE whose half precision overflows stays in float32."""
    parts = path.split(".")
    if dtype != torch.float16 or "vae" not in parts:
        return dtype
    vae = encoder.get_submodule(".".join(parts[: parts.index("vae") + 1]))
    return torch.float32 if vae.config.get("force_upcast", False) else dtype
