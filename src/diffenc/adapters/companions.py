"""The plain image encoders that a tower may be joined with, and what is known of them unloaded."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from diffenc.errors import ConfigError, near_matches


@dataclass(frozen=True, slots=True)
class Companion:
    """A CLIP or SigLIP.

    Attributes:
        name: As `FusedEncoder` takes it: a Hub id or a folder.
        hidden_size: Channels of a token.
        side: Side of its square of tokens.
    """

    name: str
    hidden_size: int
    side: int


_KNOWN = {
    "vitl336": Companion("openai/clip-vit-large-patch14-336", 1024, 24),
    "vitl224": Companion("openai/clip-vit-large-patch14", 1024, 16),
    "vitb224": Companion("openai/clip-vit-base-patch16", 768, 14),
    "so400m384": Companion("google/siglip-so400m-patch14-384", 1152, 27),
}


@cache
def find_companion(name: str) -> Companion:
    """What an alias, or a folder of transformers, stands for; no weights are read.

    Raises:
        ConfigError: It is neither, or the folder's config tells no square of patches.
    """
    if name in _KNOWN:
        return _KNOWN[name]
    config_file = Path(name).expanduser() / "config.json"
    if not config_file.is_file():
        raise ConfigError(
            f"unknown encoder to fuse {name!r}.{near_matches(name, _KNOWN)} Known are "
            f"{list(_KNOWN)}; or name a folder that holds a CLIP or SigLIP of transformers."
        )
    try:
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
        vision = config.get("vision_config", config)
        side = int(vision.get("image_size", 224)) // int(vision.get("patch_size", 32))
        return Companion(name, int(vision.get("hidden_size", 768)), side)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{config_file} is no config of a CLIP or SigLIP: {error}") from error
