"""Training of a multimodal model in LLaVA's two stages, on transformers' `Trainer`."""

from diffenc.train.config import (
    LLAVA,
    AdaptConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from diffenc.train.data import read_samples
from diffenc.train.log import read_log
from diffenc.train.miniature import write_miniature
from diffenc.train.stages import TrainResult, train

__all__ = [
    "LLAVA",
    "AdaptConfig",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "TrainResult",
    "read_log",
    "read_samples",
    "train",
    "write_miniature",
]
