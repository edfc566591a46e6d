"""LLaVA of transformers around the bundled miniature, with a random language model of 64 words."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    PreTrainedTokenizerFast,
)

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if VERSION < (4, 48):
    pytest.skip("diffenc.hosts.transformers needs transformers 4.48.3", allow_module_level=True)

from diffenc.hosts.transformers import DiffEncConfig, DiffEncImageProcessor, DiffEncModel  # noqa: E402

IMAGE_TOKEN = 63
PINPOINTS = [[128, 64], [64, 128]]
DTYPE = "dtype" if VERSION >= (4, 56) else "torch_dtype"
WORDS = ["what", "color", "is", "the", "circle", "how", "many", "red", "?"]


def build(spec: str, cls: Any = LlavaForConditionalGeneration, **options: Any) -> Any:
    """A seeded model of any class of LLaVA or, for its config, LLaVA-NeXT."""
    tiled = "Next" in cls.__name__
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    shared = {
        "vision_config": DiffEncConfig(spec, **options),
        "text_config": text,
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    if tiled:
        config: Any = LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **shared)
    else:
        config = LlavaConfig(**shared)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config)
    return model.eval()


def inner(model: Any) -> Any:
    """The part that holds tower and projector, wherever a version has it."""
    owner = getattr(model, "model", model)
    return owner if "vision_tower" in owner._modules else model


def tower_of(model: Any) -> DiffEncModel:
    """The tower of a host."""
    tower: DiffEncModel = inner(model).vision_tower
    return tower


def train_adapter(tower: DiffEncModel, scale: float = 0.2) -> None:
    """Give the adapter weights that have an effect."""
    generator = torch.Generator().manual_seed(1)
    assert tower.tower.adapter is not None
    with torch.no_grad():
        for weight in tower.tower.adapter.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)


def pixel_values(count: int = 2, seed: int = 0) -> torch.Tensor:
    """Noise in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 64, 64, generator=generator) * 2 - 1


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Noise, not square."""
    values = np.random.default_rng(seed).integers(0, 255, (count, 50, 70, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in values]


def text_ids(samples: list[int], words: int = 3, tokens: int = 64) -> dict[str, torch.Tensor]:
    """Left-padded samples that show so many images each."""
    rows = [
        [1, *([IMAGE_TOKEN] * tokens * images), *range(4 + row, 4 + row + words)]
        for row, images in enumerate(samples)
    ]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, for the language model."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    vocabulary += [f"<{index}>" for index in range(len(vocabulary), IMAGE_TOKEN)]
    backend = Tokenizer(
        models.WordLevel(
            {word: index for index, word in enumerate([*vocabulary, "<image>"])}, unk_token="<unk>"
        )
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def image_processor(tower: DiffEncModel) -> DiffEncImageProcessor:
    """Of a tower's size."""
    return DiffEncImageProcessor(tower.config.image_size)
