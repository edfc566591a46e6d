"""Runs of a tiny model: a vision model or a tiny Stable Diffusion, and a tiny Llama."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

from diffenc.mllm.training import AdaptConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig
from diffenc.mllm.training.stages import OLDEST_TRANSFORMERS

trains = pytest.mark.skipif(
    Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS),
    reason=f"training needs transformers {OLDEST_TRANSFORMERS}",
)


@dataclass(frozen=True)
class Parts:
    """Folders of models and data."""

    vision: Path
    language_model: Path
    data: dict[str, Path]
    diffusion: Path | None = None


def config(parts: Parts, output: Path, stage: Any = "align", **options: Any) -> TrainConfig:
    """A run of a few steps; options are keys of any table."""
    model = {
        "kind": "vision",
        "encoder": str(parts.vision),
        "language_model": str(parts.language_model),
        "layer": -1,
        "template": "chat",
    }
    if options.get("kind") == "diffusion":
        model["encoder"] = str(parts.diffusion)
        del model["layer"]
    data = {"annotations": str(parts.data[stage]), "images": str(parts.data["images"])}
    optim = {
        "learning_rate": 1e-2,
        "batch_size": 4,
        "device_batch_size": 2,
        "epochs": 2,
        "precision": "fp32",
        "gradient_checkpointing": False,
    }
    tables: dict[str, tuple[Any, dict[str, Any]]] = {
        "model": (ModelConfig, model),
        "data": (DataConfig, data),
        "optim": (OptimConfig, optim),
        "adapt": (AdaptConfig, {}),
    }
    top: dict[str, Any] = {"save_steps": 2, "log_steps": 1}
    for key in tables.keys() & options.keys():
        top[key] = options.pop(key)
        del tables[key]
    for key, value in options.items():
        for kind, values in tables.values():
            if key in kind.__dataclass_fields__ and not (
                key == "language_model" and kind is ModelConfig
            ):
                values[key] = value
                break
        else:
            top[key] = value
    made = {name: kind(**values) for name, (kind, values) in tables.items()}
    if "adapt" in tables and not tables["adapt"][1]:
        del made["adapt"]
    return TrainConfig(stage=stage, output=str(output), **top, **made)
