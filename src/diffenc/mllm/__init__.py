"""A diffusion encoder, a projector and a causal language model as one multimodal model."""

from diffenc.mllm.chat import IGNORE_ID, IMAGE_ID, IMAGE_MARK, Chat, ChatTokens
from diffenc.mllm.language import load_language_model
from diffenc.mllm.model import CAPTION_REQUEST, DiffusionVLM
from diffenc.mllm.samples import pad
from diffenc.mllm.vision import VisionTokens, tokens_per_image

__all__ = [
    "CAPTION_REQUEST",
    "IGNORE_ID",
    "IMAGE_ID",
    "IMAGE_MARK",
    "Chat",
    "ChatTokens",
    "DiffusionVLM",
    "VisionTokens",
    "load_language_model",
    "pad",
    "tokens_per_image",
]
