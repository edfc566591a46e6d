"""What a folder holds, for messages of readers that expected something else."""

import json
from pathlib import Path

from diffenc.storage.names import StrPath, is_file

_KINDS = {
    "fusion.json": "a saved FusedEncoder, which FusedEncoder.from_pretrained reads",
    "vlm.json": "a saved DiffusionVLM, which DiffusionVLM.from_pretrained reads",
    "scorer_config.json": "a saved CrossAttnScorer, which CrossAttnScorer.from_pretrained reads",
    "adapter_config.json": "a LoRA adapter, which load_lora of an encoder reads",
    "features.json": "features of pictures, which diffenc.open_features reads",
    "bank.json": "a query bank, which QueryBank.load reads",
    "model_index.json": "a diffusion model, which DiffusionEncoder.from_pretrained and "
    "load_backbone read",
}
"""What a file of a name says of its folder."""

_ENCODER = (
    "a saved DiffusionEncoder, which DiffusionEncoder.from_pretrained reads; its .backbone is the "
    "model"
)
_MOST_BYTES = 2**20


def kind_of_folder(folder: StrPath) -> str:
    """Description of what a folder holds and what reads it, or "" where that is not known."""
    root = Path(folder)
    for name, kind in _KINDS.items():
        if is_file(root / name):
            return kind
    values = _config(root / "config.json")
    if "backbone" in values and "timestep" in values:
        return _ENCODER
    model = values.get("model_type")
    return f"a model of transformers, of the kind {model[:40]!r}" if isinstance(model, str) else ""


def _config(path: Path) -> dict[str, object]:
    """The config in a file; empty for what is none."""
    if not is_file(path):
        return {}
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MOST_BYTES))
    except Exception:  # anything may lie there, and another message is on its way
        return {}
    return values if isinstance(values, dict) else {}
