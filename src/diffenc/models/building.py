"""Parts of a model built from their configs, with whatever weights their classes draw."""

from collections.abc import Mapping
from typing import Any

import torch

from diffenc.models.configs import Architecture


def build_part(name: str, config: Mapping[str, Any]) -> Any:
    """Build one part of a model.

    Args:
        name: Name of the part: "unet", "vae", "text_encoder" or "text_encoder_2".
        config: Config of the part, as JSON holds it.

    Returns:
        A module of diffusers or transformers, on torch's default device.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    values = dict(config)
    if name.startswith("text_encoder"):
        kind: Any = CLIPTextModelWithProjection if name.endswith("_2") else CLIPTextModel
        return kind(CLIPTextConfig.from_dict(values))
    usual = "UNet2DConditionModel" if name == "unet" else "AutoencoderKL"
    kind = getattr(diffusers, values.get("_class_name", usual))
    return kind.from_config({key: value for key, value in values.items() if key[:1] != "_"})


def build_on_meta(architecture: Architecture) -> dict[str, Any]:
    """Build every part of a model but its scheduler in float32 on the meta device: shapes alone."""
    with torch.device("meta"):
        return {
            name: build_part(name, config).float().eval()
            for name, config in architecture.configs.items()
            if name != "scheduler"
        }
