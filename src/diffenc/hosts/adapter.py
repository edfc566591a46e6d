"""The small trainable part of a tower: low-rank updates of the cross-attentions that are run.

Hosts freeze, save and drop parameters by their names. The adapter's are registered in the tower as
`adapter.<i>_down` and `adapter.<i>_up`, from construction on, and are the very parameters that run
in the U-Net through peft once the model is loaded.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffenc.denoiser.joint_attention import adapted_attentions
from diffenc.denoiser.lora.adapters import add_lora
from diffenc.denoiser.lora.options import PROJECTIONS, LoraOptions
from diffenc.errors import BackboneError, ConfigError
from diffenc.hosts.hidden import Conversion, adapt_dtype
from diffenc.hosts.spec import TowerSpec
from diffenc.models.denoisers import build_denoiser
from diffenc.models.reached_layers import reached_projections
from diffenc.storage.reading import parse_json
from diffenc.storage.tensors import misfits, read_metadata, read_tensors, write_tensors
from diffenc.storage.writing import make_folder

ADAPTER_FILE = "diffenc_adapter.safetensors"
LORA_NAME = "tower"
_LARGEST = 1e4


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """A linear layer that is updated.

    Attributes:
        path: Module path of the layer in the U-Net.
        in_features: Number of the layer's input channels.
        out_features: Number of the layer's output channels.
    """

    path: str
    in_features: int
    out_features: int


def adapted_layers(unet_config: Mapping[str, Any], taps: Sequence[str]) -> tuple[AdaptedLayer, ...]:
    """Projections of cross-attentions that the features at some taps depend on, in order.

    Other projections would get no gradient, which distributed training takes for an error.

    Args:
        unet_config: Config of the denoiser, with its class where that is no
            `UNet2DConditionModel`.
        taps: Names of the taps: module paths of the U-Net, or "latents".
    """
    with torch.device("meta"):
        unet: Any = build_denoiser(unet_config)
    paths = [f"{each}.{part}" for each in adapted_attentions(unet) for part in PROJECTIONS]
    reached = reached_projections(dict(unet_config), taps)
    layers = [(path, unet.get_submodule(path)) for path in paths if path in reached]
    return tuple(AdaptedLayer(path, each.in_features, each.out_features) for path, each in layers)


class Adapter(nn.Module):
    """Low-rank updates under names that no host takes for its own.

    A new adapter changes nothing. Its weights are made on the CPU in float32, whatever device and
    dtype are the default while a host builds its model, and marked as initialised for
    transformers.

    Args:
        layers: Projections that are updated; see `adapted_layers`.
        rank: Rank of the updates.
        alpha: Numerator of the scale alpha / rank of the updates; None is the rank, a scale of 1.
        seed: Seed of the initial weights.

    Raises:
        ConfigError: There is nothing to update.
    """

    def __init__(
        self,
        layers: Sequence[AdaptedLayer],
        *,
        rank: int,
        alpha: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not layers:
            raise ConfigError(
                "no cross-attention runs before the last tap, so there is nothing to adapt; read a "
                "later tap, or leave the rank out"
            )
        self.layers, self.rank, self.alpha, self.seed = tuple(layers), rank, alpha, seed
        self._fill()

    @classmethod
    def of_spec(cls, spec: TowerSpec) -> "Adapter | None":
        """The adapter that a spec asks for, or None."""
        if spec.rank is None:
            return None
        unet = spec.architecture.denoiser_config
        layers = adapted_layers(unet, [tap.name for tap in spec.tap_infos])
        return cls(layers, rank=spec.rank, alpha=spec.alpha, seed=spec.seed)

    def _fill(self) -> None:
        """Register new weights: seeded small ones in, zeros out."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        self._is_hf_initialized = True  # transformers 5 then leaves the module as it is
        for index, layer in enumerate(self.layers):
            bound = layer.in_features**-0.5
            down = torch.empty(self.rank, layer.in_features, dtype=torch.float32, device="cpu")
            down.uniform_(-bound, bound, generator=generator)
            up = torch.zeros(layer.out_features, self.rank, dtype=torch.float32, device="cpu")
            for name, value in ((f"{index}_down", down), (f"{index}_up", up)):
                old = self._parameters.get(name)
                parameter = nn.Parameter(value, requires_grad=old is None or old.requires_grad)
                self.register_parameter(name, parameter)
                # Afterwards: transformers 4 may exchange it on the way, and chokes on the mark.
                self._parameters[name]._is_hf_initialized = True  # type: ignore[union-attr]

    def inject(self, unet: nn.Module) -> None:
        """Put the updates into a U-Net, where peft runs them.

        Raises:
            ConfigError: The U-Net has them already.
        """
        paths = [layer.path for layer in self.layers]
        attentions = dict.fromkeys(f"{path.partition('.attn2.')[0]}.attn2" for path in paths)
        options = LoraOptions(rank=self.rank, alpha=self.alpha)
        add_lora(unet, list(attentions), options, name=LORA_NAME, only=paths)
        self.link(unet)

    def link(self, unet: nn.Module) -> bool:
        """Let the U-Net run this adapter's present parameters; hosts exchange them.

        Returns:
            Whether the host had exchanged any parameter.

        Raises:
            ConfigError: The parameters are elsewhere: sharded away, or on the meta device.
        """
        exchanged = False
        for index, layer in enumerate(self.layers):
            module: Any = unet.get_submodule(layer.path)
            for name, part in ((f"{index}_down", module.lora_A), (f"{index}_up", module.lora_B)):
                weight = getattr(self, name)
                if not weight.numel() or weight.device.type == "meta":
                    raise ConfigError(
                        "the adapter's weights are not here: DeepSpeed ZeRO-3 shards them, or the "
                        "model lies on the meta device. Train an adapter with ZeRO-2 or DDP, or "
                        "leave the rank out of the spec"
                    )
                linear = part[LORA_NAME]
                if linear._parameters["weight"] is not weight:
                    # Sharding hosts leave a view here, which an attribute would not let in.
                    linear._parameters["weight"] = weight
                    exchanged = True
        return exchanged

    def problem(self) -> str:
        """What is wrong with the weights, as hosts leave those that no checkpoint had, or ""."""
        for name, parameter in self.named_parameters():
            if parameter.device.type == "meta":
                return f"{name} is on the meta device"
            if parameter.numel() == 0:
                continue  # sharded; `link` answers that
            largest = parameter.detach().abs().max().item()
            if not largest <= _LARGEST:
                return f"{name} holds {largest}"
            if name.endswith("_down") and largest == 0:
                return f"{name} is all zeros"
        return ""

    def reset(self) -> None:
        """Weights as of a new adapter, on the CPU in float32."""
        self._fill()

    def keep_precise(self) -> None:
        """Bring weights that a host loaded in float16 to float32."""
        for parameter in self.parameters():
            if parameter.dtype == torch.float16:
                parameter.data = parameter.data.float()

    def _apply(self, fn: Conversion, recurse: bool = True) -> "Adapter":
        super()._apply(adapt_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"{len(self.layers)} layers, rank={self.rank}, alpha={self.alpha}"


def fingerprint(spec: TowerSpec) -> str:
    """What an adapter's weights belong to: model, taps, rank and scale."""
    taps = [tap.name for tap in spec.tap_infos]
    described = {"model": _called(spec.model), "taps": taps, "rank": spec.rank, "alpha": spec.alpha}
    return json.dumps(described, sort_keys=True)


def _called(model: str) -> str:
    """A model's name wherever its folder lies."""
    return Path(model).name if Path(model).is_absolute() else model


def _belongs(written: str, spec: TowerSpec) -> bool:
    """Whether a fingerprint in a file is that of a spec; earlier versions wrote whole paths."""
    try:
        described = parse_json(written, where="an adapter's mark")
        model = described["model"]
        if Path(spec.model).is_absolute():
            described["model"] = Path(model).name
        return json.dumps(described, sort_keys=True) == fingerprint(spec)
    except (ConfigError, ValueError, TypeError, KeyError):
        return False


def save_adapter(adapter: Adapter, spec: TowerSpec, folder: "str | os.PathLike[str]") -> Path:
    """Write `diffenc_adapter.safetensors`; it is there whole or not at all.

    Raises:
        OutputError: The folder cannot be written.
    """
    state = {f"adapter.{name}": value.cpu() for name, value in adapter.state_dict().items()}
    metadata = {"format": "pt", "spec": str(spec), "belongs_to": fingerprint(spec)}
    path = make_folder(folder) / ADAPTER_FILE
    write_tensors(path, state, metadata=metadata)
    return path


def read_adapter(path: "str | os.PathLike[str]", spec: TowerSpec) -> dict[str, Tensor]:
    """Weights from a file that `save_adapter` wrote, by the adapter's own names.

    Raises:
        BackboneError: The file is missing or broken.
        ConfigError: It belongs to another spec.
    """
    metadata = read_metadata(path, error=BackboneError)
    state = read_tensors(path, error=BackboneError, finite=True)
    theirs = metadata.get("belongs_to")
    if theirs is not None and not _belongs(theirs, spec):
        raise ConfigError(
            f"{path} is the adapter of another tower: it was saved by {metadata.get('spec')!r}, "
            f"and this one is {str(spec)!r}"
        )
    return {key.removeprefix("adapter."): value for key, value in state.items()}


def load_state(adapter: Adapter, state: Mapping[str, Tensor], source: object) -> None:
    """Copy weights into an adapter's parameters, which stay the same objects.

    Raises:
        ConfigError: Names or shapes are not this adapter's.
    """
    own = dict(adapter.named_parameters())
    if wrong := misfits(state, own):
        raise ConfigError(
            f"{source} is no adapter of this tower: {len(wrong)} of {len(own)} weights differ in "
            f"name or shape, the first is {wrong[0]!r}; rank, taps and model must be those of the "
            "spec it was trained with"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
