"""What hosts read of a vision model's config, and save beside their checkpoints."""

import os
from typing import Any

from diffenc.hosts.spec import TowerSpec
from diffenc.storage.writing import make_folder, write_json


class TowerConfig:
    """What hosts read of a vision model's config.

    Attributes:
        spec: Text of the whole spec.
        hidden_size: Number of channels of a token.
        image_size: Side of the images in pixels.
        patch_size: Image pixels per side of a token.
    """

    model_type = "diffenc_tower"

    def __init__(self, spec: TowerSpec) -> None:
        self.spec = str(spec)
        self.hidden_size, self.image_size = spec.hidden_size, spec.image_size
        self.patch_size = spec.patch_size

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {"model_type": self.model_type, **vars(self)}

    def save_pretrained(self, folder: "str | os.PathLike[str]", **ignored: Any) -> None:
        """Write `config.json`.

        Raises:
            OutputError: The folder cannot be written.
        """
        write_json(make_folder(folder) / "config.json", self.to_dict())
