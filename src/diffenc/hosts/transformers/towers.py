"""The tower of a model of transformers, or why it has none."""

from typing import Any

from torch import nn

from diffenc.errors import ConfigError
from diffenc.hosts.transformers.modeling import DiffEncModel


def require_tower(model: nn.Module) -> DiffEncModel:
    """The tower of diffenc in a model of transformers.

    Some hosts make a vision config of their own of the one that a checkpoint names, and then build
    their own tower without a word: ask after building and after loading.

    Args:
        model: Model of any class.

    Raises:
        ConfigError: It has another tower, or none.
    """
    for part in model.modules():
        if isinstance(part, DiffEncModel):
            return part
    config: Any = getattr(getattr(model, "config", None), "vision_config", None)
    kept = "" if config is None else f", and its vision_config is a {type(config).__name__}"
    raise ConfigError(
        f"{type(model).__name__} has no vision tower of diffenc{kept}. Give a DiffEncConfig as "
        "vision_config; where a class keeps its own kind when it loads, pass the whole config: "
        "from_pretrained(folder, config=config)"
    )
