"""Training of a multimodal model in LLaVA's two stages, on transformers' `Trainer`."""

from diffenc.mllm.training.config import (
    LLAVA,
    AdaptConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from diffenc.mllm.training.data import read_samples
from diffenc.mllm.training.log import read_log
from diffenc.mllm.training.miniature import write_miniature
from diffenc.mllm.training.stages import TrainResult, train

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
