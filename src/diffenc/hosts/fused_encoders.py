"""The plain image encoders that a tower may be joined with, and what is known of them unloaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffenc.errors import ConfigError, near_matches
from diffenc.storage.names import is_file
from diffenc.storage.pretrained import lasting_name
from diffenc.storage.reading import read_json
from diffenc.storage.schema import checked


@dataclass(frozen=True, slots=True)
class Companion:
    """A CLIP or SigLIP.

    Attributes:
        name: Name that `FusedEncoder` takes: a Hub id or a folder.
        hidden_size: Number of channels of a token.
        side: Number of tokens per side of the square of tokens.
    """

    name: str
    hidden_size: int
    side: int

    @property
    def spelling(self) -> str:
        """Name in a spec: the alias, or the folder."""
        aliases = {companion.name: alias for alias, companion in _KNOWN.items()}
        return aliases.get(self.name, self.name)


_KNOWN = {
    "vitl336": Companion("openai/clip-vit-large-patch14-336", 1024, 24),
    "vitl224": Companion("openai/clip-vit-large-patch14", 1024, 16),
    "vitb224": Companion("openai/clip-vit-base-patch16", 768, 14),
    "so400m384": Companion("google/siglip-so400m-patch14-384", 1152, 27),
}


def find_companion(name: str) -> Companion:
    """What an alias, or a folder of transformers, stands for; no weights are read.

    Raises:
        ConfigError: It is neither, or the folder's config tells no square of patches.
    """
    return _KNOWN[name] if name in _KNOWN else _read(lasting_name(name, aliases=()))


def _read(name: str) -> Companion:
    config_file = Path(name) / "config.json"
    if not is_file(config_file):
        raise ConfigError(
            f"unknown encoder to fuse {name!r}.{near_matches(name, _KNOWN)} Known are "
            f"{list(_KNOWN)}; or name a folder that holds a CLIP or SigLIP of transformers."
        )
    try:
        config = read_json(config_file, finite=False)
        vision = checked(config.get("vision_config", config), dict[str, Any], "vision_config")
        defaults = {"image_size": 224, "patch_size": 32, "hidden_size": 768}
        sizes = {key: checked(vision.get(key, own), int, key) for key, own in defaults.items()}
        if not 1 <= sizes["patch_size"] <= sizes["image_size"] or sizes["hidden_size"] < 1:
            raise ConfigError(f"sizes must be 1 or more, got {sizes}")
    except ConfigError as error:
        raise ConfigError(f"{config_file} is no config of a CLIP or SigLIP: {error}") from error
    return Companion(name, sizes["hidden_size"], sizes["image_size"] // sizes["patch_size"])
