"""Everything that a tower needs to be built without its weights, as transformers keeps it."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from diffenc.errors import ConfigError
from diffenc.hosts.spec import SPEC_KEYS, TowerSpec
from diffenc.models import Architecture
from diffenc.models.sources import lasting_source

INSIDE = "checkpoint"
"""Name of a backbone whose weights are part of the checkpoint."""

_SPEC_NAMES = ({field.name for field in fields(TowerSpec)} | {*SPEC_KEYS}) - {"dtype"}
"""Options of a spec; transformers' own configs have a `dtype` too."""


class DiffEncConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is seen as Any
    """Config of a `DiffEncModel`; it stands as `vision_config` in `LlavaConfig` and others.

    Sizes follow from the spec. The configs of the model's parts are kept beside it, so that
    `AutoModel.from_config` reads nothing from elsewhere, whatever the spec names.

    Args:
        spec: Spec of the tower, such as ``"diffenc:sdxl?t=50&rank=16"``; see
            `diffenc.hosts.spec.TowerSpec`.
        backbone_source: Source of the backbone's weights. None takes the model that the spec names;
            another name, Hub id or folder takes that one; "checkpoint" saves and loads the weights
            with the model.
        architecture: Configs of the model's parts, by part; None looks them up.
        default_taps: Taps that the model reads where the spec names none; None looks them up.
        kwargs: Further keyword arguments of `PretrainedConfig`. Sizes among them are checked
            against the spec.

    Attributes:
        hidden_size: Number of channels of a token.
        image_size: Side of the square images, in pixels.
        patch_size: Image pixels per side of a token.
        num_patches: Number of tokens of an image.
        num_hidden_layers: Number of hidden layers: the length of `hidden_states`, less one. All its
            entries are the same.

    Raises:
        ConfigError: The spec does not parse, its tokens cannot be had here, or a size is not that
            of the spec.
        BackboneError: The spec names a model whose configs cannot be had.
    """

    model_type = "diffenc"

    def __init__(
        self,
        spec: str = "diffenc:shapes",
        backbone_source: str | None = None,
        architecture: dict[str, dict[str, Any]] | None = None,
        default_taps: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        parsed = TowerSpec.parse(spec)
        if of_spec := sorted(kwargs.keys() & _SPEC_NAMES):
            raise ConfigError(
                f"{of_spec[0]} belongs in the spec, which says everything of the tower: "
                f'"{spec}{"&" if "?" in spec else "?"}{of_spec[0]}=..." in the words of TowerSpec'
            )
        if architecture is None:
            architecture = parsed.architecture.configs
        if "unet" not in architecture:
            raise ConfigError(
                f"{spec!r} names a diffusion transformer, and this tower builds U-Nets; use "
                "DiffusionVisionTower, or DiffusionVLM"
            )
        if default_taps is None:
            default_taps = list(parsed.architecture.default_taps)
        if backbone_source not in (None, INSIDE):
            backbone_source = lasting_source(backbone_source)
        # Another directory may read it: a folder by its whole path.
        self.spec = str(parsed) if Path(parsed.model).is_absolute() else spec
        self.backbone_source = backbone_source
        self.architecture = {part: dict(config) for part, config in architecture.items()}
        self.default_taps = list(default_taps)
        tower = self.tower_spec
        if backbone_source == INSIDE:
            check_inside(tower)
        sizes = {
            "hidden_size": tower.hidden_size,
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "num_patches": tower.num_patches,
            "num_channels": 3,
        }
        for name, value in sizes.items():
            if kwargs.pop(name, value) != value:
                raise ConfigError(f"{name} of {spec!r} is {value}; change the spec, not the size")
            setattr(self, name, value)
        # As many as CLIP has, so that the layers that recipes name exist.
        self.num_hidden_layers = int(kwargs.pop("num_hidden_layers", 24))
        super().__init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        message = f"'{type(self).__name__}' object has no attribute '{name}'"
        if name.startswith("_") or "spec" not in self.__dict__:
            raise AttributeError(message)
        raise AttributeError(
            f"{message}: a host that reads it builds its own kind of tower of a vision_config, and "
            "takes none of diffenc. LLaVA, LLaVA-NeXT, LLaVA-OneVision, Mistral3, PaliGemma and "
            "others take one; see the guide 'In which host'"
        )

    @property
    def tower_spec(self) -> TowerSpec:
        """The spec, with the configs kept here in place of those that its model has now."""
        spec = TowerSpec.parse(self.spec)
        if self.backbone_source not in (None, INSIDE):
            spec = replace(spec, model=self.backbone_source)
        architecture = Architecture(self.architecture, tuple(self.default_taps))
        spec.__dict__["architecture"] = architecture  # a cached property: nothing is looked up
        return spec

    @property
    def inside(self) -> bool:
        """Whether the weights of the backbone are part of the checkpoint."""
        return bool(self.backbone_source == INSIDE)


def check_inside(spec: TowerSpec) -> None:
    """Raise a `ConfigError` where a checkpoint cannot hold all that a tower reads with."""
    if spec.fuse is not None:
        raise ConfigError(
            f"{str(spec)!r} joins a second encoder, which no checkpoint of this tower holds; leave "
            "backbone_source out, which refers to both"
        )
    if spec.tokens != "grid":
        raise ConfigError(
            f"{str(spec)!r} has tokens of words, and no checkpoint of this tower holds the "
            "tokenizer that tells words; leave backbone_source out, or take tokens=grid"
        )
