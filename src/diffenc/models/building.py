"""Parts of a model built from their configs, with whatever weights their classes draw."""

from collections.abc import Mapping
from typing import Any

import torch

from diffenc.models.configs import Architecture
from diffenc.models.family_files import classes_of


def build_part(name: str, config: Mapping[str, Any], family: str | None = None) -> Any:
    """Build one part of a model.

    Args:
        name: Name of the part, such as "unet", "vae" or "text_encoder_2".
        config: Config of the part, as JSON holds it.
        family: Family of the model; None for a part by itself, see `classes_of`.

    Returns:
        A module of diffusers or transformers, on torch's default device.
    """
    import diffusers
    import transformers

    values = dict(config)
    usual = classes_of(name, family)[0]
    if name.startswith("text_encoder"):
        kind: Any = getattr(transformers, usual)
        return kind(kind.config_class.from_dict(values))
    kind = getattr(diffusers, values.get("_class_name", usual))
    return kind.from_config({key: value for key, value in values.items() if key[:1] != "_"})


def build_on_meta(architecture: Architecture) -> dict[str, Any]:
    """Build every part of a model but its scheduler in float32 on the meta device: shapes alone."""
    with torch.device("meta"):
        return {
            name: build_part(name, config, architecture.family).float().eval()
            for name, config in architecture.configs.items()
            if name != "scheduler"
        }
