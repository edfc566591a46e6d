"""A tiny random Llama with a chat template, and vision models, built without network."""

import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from builders import seeded

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}<|system|>{{ m['content'] }}\n"
    "{% elif m['role'] == 'user' %}<|user|>{{ m['content'] }}\n"
    "{% else %}<|assistant|>{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def _backend() -> str:
    marks = ["<unk>", "<bos>", "<eos>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*marks, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    return tokenizer.to_str()


def tiny_lm_tokenizer(
    *, template: str | None = TEMPLATE, pad_token: str | None = "<pad>", eos: str | None = "<eos>"
) -> PreTrainedTokenizerFast:
    """Bytes and a few marks, so that what is encoded can be read letter by letter."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token=eos,
        pad_token=pad_token,
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_lm(context: int = 2048, hidden_size: int = 16) -> LlamaForCausalLM:
    """Two layers, 263 tokens."""
    config = LlamaConfig(
        vocab_size=263,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    return seeded(lambda: LlamaForCausalLM(config))


def save_tiny_lm(folder: Path, **options: int) -> Path:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` read."""
    tiny_lm(**options).save_pretrained(folder)
    tiny_lm_tokenizer().save_pretrained(folder)
    return folder


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Noise in 8 x 8 blocks, of this (width, height)."""
    rng = random.Random(seed)
    small = Image.new("RGB", (8, 8))
    small.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(64)])
    return small.resize(size, Image.Resampling.NEAREST)


def seeded_noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def save_tiny_vision(folder: Path) -> Path:
    """A DINOv2 with registers of 8 channels for pictures of 16 pixels: 4 patches."""
    if not hasattr(transformers, "Dinov2WithRegistersModel"):
        pytest.skip("transformers below 4.48 has no DINOv2 with registers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        num_register_tokens=3,
    )
    seeded(lambda: transformers.Dinov2WithRegistersModel(config)).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)
    return folder


def save_tiny_clip(folder: Path, *, hidden_size: int = 8, layers: int = 2) -> Path:
    """A CLIP for pictures of 32 pixels: 4 x 4 patches."""
    width = {"hidden_size": hidden_size, "intermediate_size": hidden_size, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={
            **width,
            "num_hidden_layers": layers,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 12,
        },
        text_config={
            **width,
            "num_hidden_layers": 1,
            "vocab_size": 9,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        projection_dim=12,
    )
    seeded(lambda: CLIPModel(config)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


class RecordingEncoder(torch.nn.Module):
    """Three tokens of two channels: the mean of a picture's red, and the length of its prompt."""

    hidden_size, token_channels, num_tokens = 2, (2,), 3

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, list[str] | None]] = []

    def forward(self, images, prompts=None):
        self.calls.append((len(images), prompts))
        lengths = [len(prompt) for prompt in prompts or [""] * len(images)]
        reds = [torch.tensor(np.asarray(image))[..., 0].float().mean() / 255 for image in images]
        rows = [[red.item(), length / 10] for red, length in zip(reds, lengths, strict=True)]
        return torch.tensor(rows)[:, None] * torch.tensor([1.0, 0.5, -1.0])[:, None]
