"""TinyLLaVA Factory on a diffusion encoder.

Its tower is named "diffenc:<folder>", where the folder's `config.json` (`write_folder`) holds the
spec; it is built in the host's constructor, re-initialised by the host, and loaded afterwards.
"""

import importlib
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from diffenc.errors import BackboneError, ConfigError
from diffenc.hosts.prompts import Prompts
from diffenc.hosts.spec import PREFIX, TowerSpec
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.storage.tensors import read_pickled
from diffenc.storage.writing import reporting

_WEIGHTS = "pytorch_model.bin"


class TinyTowerConfig(PretrainedConfig):  # type: ignore[misc]  # untyped
    """What TinyLLaVA reads of a tower before it is built.

    Args:
        spec: Name of the tower; "" only for transformers' own blank instances.
        kwargs: Further keyword arguments of `PretrainedConfig`.
    """

    model_type = "diffenc_tower"

    def __init__(self, spec: str = "", **kwargs: Any) -> None:
        self.spec = spec
        if spec:
            parsed = TowerSpec.parse(spec)
            kwargs["hidden_size"], kwargs["image_size"] = parsed.hidden_size, parsed.image_size
            kwargs["patch_size"] = parsed.patch_size
        super().__init__(**kwargs)

    @property
    def vision_config(self) -> "TinyTowerConfig":
        """The config itself."""
        return self


class TinyLLaVATower(nn.Module):
    """A vision tower with the contract of TinyLLaVA Factory.

    Args:
        cfg: A `TinyTowerConfig`, or any config whose `spec` names a tower.

    Raises:
        ConfigError: It names none.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        spec = getattr(cfg, "spec", None)
        if not TowerSpec.is_spec(spec):
            raise ConfigError(
                f"the config of a tower must hold its spec, got {spec!r}; write_folder(spec, "
                f"folder) makes the folder that '{PREFIX}<folder>' names"
            )
        self.config = cfg
        self._vision_tower = DiffusionVisionTower(spec, delay_load=True)
        self._image_processor = self._vision_tower.image_processor

    def load_model(
        self,
        vision_tower_name: str = "",
        *,
        pretrained_vision_tower_path: Any = None,
        **ignored: Any,
    ) -> None:
        """Load the frozen model, and the adapter that TinyLLaVA saved beside its checkpoint.

        Args:
            vision_tower_name: Name of the tower, which the config holds already.
            pretrained_vision_tower_path: Folder with `pytorch_model.bin`; None where there is none.
            ignored: Further arguments that the host passes; ignored.

        Raises:
            BackboneError: The weights cannot be read, or are another adapter's.
        """
        if pretrained_vision_tower_path is not None:
            self._load_saved(Path(pretrained_vision_tower_path))
        self._vision_tower.load_model()

    def _load_saved(self, folder: Path) -> None:
        try:
            state = read_pickled(folder / _WEIGHTS, error=BackboneError, finite=True)
            self._vision_tower.load_state_dict(state)
        except (BackboneError, RuntimeError, ValueError) as error:
            raise BackboneError(f"{folder / _WEIGHTS} is not of this tower: {error}") from error

    def forward(self, x: Tensor, prompts: Prompts | None = None, **ignored: Any) -> Tensor:
        """Tokens (b n c) of images.

        Args:
            x: Images, as `DiffusionVisionTower` takes them.
            prompts: Prompts, one for all images or one each.
            ignored: Layer and strategy that the host selects; ignored, as there is no class token.
        """
        features: Tensor = self._vision_tower(x, prompts)
        return features

    @property
    def vision_tower(self) -> DiffusionVisionTower:
        """The tower inside."""
        return self._vision_tower


def write_folder(spec: str, folder: "str | os.PathLike[str]") -> str:
    """Write the `config.json` from which TinyLLaVA builds a tower.

    Returns:
        Name to pass to TinyLLaVA as its vision tower.

    Raises:
        ConfigError: The spec does not parse, or the folder's path holds a colon.
    """
    path = Path(folder).resolve()
    if ":" in str(path):
        raise ConfigError(f"TinyLLaVA splits names at ':', which {str(path)!r} holds")
    with reporting(path):
        TinyTowerConfig(spec).save_pretrained(path)
    return f"{PREFIX}{path}"


def register(package: str = "tinyllava") -> None:
    """Add the tower to TinyLLaVA's registry, and its config to transformers'.

    Args:
        package: Name of TinyLLaVA's top-level module.

    Raises:
        ConfigError: The package is not there.
    """
    AutoConfig.register(TinyTowerConfig.model_type, TinyTowerConfig, exist_ok=True)
    try:
        towers = importlib.import_module(f"{package}.model.vision_tower")
    except Exception as error:  # its own code runs here
        raise ConfigError(f"cannot import {package}.model.vision_tower: {error!r}") from error
    towers.register_vision_tower("diffenc")(TinyLLaVATower)
