"""What hosts read of a vision model's config, and save beside their checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

from diffenc.adapters.spec import TowerSpec
from diffenc.errors import OutputError


class TowerConfig:
    """What hosts read of a vision model's config.

    Attributes:
        spec: The whole spec, as text.
        hidden_size: Channels of a token.
        image_size: Side of the images in pixels.
        patch_size: Pixels per token and side.
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
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.to_dict(), indent=2) + "\n"
            (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error}") from error
