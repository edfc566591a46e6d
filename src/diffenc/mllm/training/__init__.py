"""Training on transformers' `Trainer`: a multimodal model in LLaVA's two stages, or an encoder."""

from diffenc.mllm.training.config import (
    LLAVA,
    AdaptConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from diffenc.mllm.training.data import read_samples
from diffenc.mllm.training.ground_config import GroundConfig
from diffenc.mllm.training.log import read_log
from diffenc.mllm.training.miniature import write_miniature
from diffenc.mllm.training.stages import TrainResult, train

__all__ = [
    "LLAVA",
    "AdaptConfig",
    "DataConfig",
    "GroundConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "TrainResult",
    "read_log",
    "read_samples",
    "train",
    "write_miniature",
]
