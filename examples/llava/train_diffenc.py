"""LLaVA's training script with a diffusion tower that reads the question.

Started as LLaVA's `llava/train/train_mem.py`, with the same options; see README.md beside it. The
environment variable DIFFENC_PROMPTS names another policy than "question", or "none".
"""

import importlib
import os

from diffenc.hosts.llava import modernize, register, train_with_prompts

policy = os.environ.get("DIFFENC_PROMPTS", "question")
modernize("llava")
if policy == "none":
    register("llava")
else:
    train_with_prompts("llava", policy)

if __name__ == "__main__":
    importlib.import_module("llava.train.train").train(
        attn_implementation=os.environ.get("DIFFENC_ATTENTION", "flash_attention_2")
    )
