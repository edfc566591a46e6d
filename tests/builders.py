"""Tiny random models with the topology of real ones, equal on every run.

The pipelines follow the published configs of Stable Diffusion 1.5, 2.1 and XL in all but width and
text depth: block types, layers per block, attention heads, projections, schedulers, scaling
factors, token ids and padding. They are 8 to 16 channels wide and made for images of 64 pixels.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

Model = TypeVar("Model", bound=nn.Module)

WORDS = ("a", "blue", "circle", "left", "of", "photo", "red", "square")
NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def seeded(build: Callable[[], Model]) -> Model:
    """A frozen model in eval mode, the same each time; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval().requires_grad_(False)


def tiny_unet() -> UNet2DConditionModel:
    return _unet(
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
    )


def tiny_vae() -> AutoencoderKL:
    return _vae(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=16)


def tiny_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer that keeps `WORDS` whole and spells any other word."""
    letters = sorted(
        ByteLevel.alphabet()
    )  # starts with "!", which SD 2 pads with: id 0, as in CLIP
    merges = {}  # a dict, for an ordered set
    for word in WORDS:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            merges[left, right] = left + right
            left += right
    tokens = [*letters, *(letter + "</w>" for letter in letters), *merges.values()]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    with tempfile.TemporaryDirectory() as folder:  # through files, which transformers 4 insists on
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(vocab))
        merges_file.write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
        return CLIPTokenizer(
            str(vocab_file), str(merges_file), pad_token=pad_token, model_max_length=77
        )


def tiny_text_encoder() -> CLIPTextModel:
    return seeded(lambda: CLIPTextModel(_text_config(hidden_size=8)))


def save_sd(folder: Path, kind: Literal["sd1.5", "sd2.1-base", "sd2.1"]) -> Path:
    """Write a Stable Diffusion pipeline of one text encoder to `folder`."""
    unet_options: dict[str, Any]
    if kind == "sd1.5":
        text_options = {"hidden_act": "quick_gelu", "num_hidden_layers": 2}
        unet_options = {"attention_head_dim": 4}
    else:
        text_options = {"hidden_act": "gelu", "num_hidden_layers": 3}
        unet_options = {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True}
    if kind == "sd2.1":
        scheduler = DDIMScheduler(
            **NOISE_SCHEDULE,
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
        )
    else:
        scheduler = PNDMScheduler(**NOISE_SCHEDULE, skip_prk_steps=True)
    text_config = _text_config(hidden_size=16, **text_options)
    pipeline = StableDiffusionPipeline(
        vae=_sd_vae(sample_size=64, scaling_factor=0.18215),
        text_encoder=seeded(lambda: CLIPTextModel(text_config)),
        tokenizer=tiny_tokenizer(pad_token="<|endoftext|>" if kind == "sd1.5" else "!"),
        unet=_unet(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
            layers_per_block=2,
            norm_num_groups=4,
            cross_attention_dim=16,
            **unet_options,
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def save_sdxl(folder: Path, *, depth: int = 3) -> Path:
    """Write an SDXL pipeline of two text encoders to `folder`; SDXL's own depth is 10."""
    config = _text_config(hidden_size=8, hidden_act="quick_gelu", num_hidden_layers=2)
    config_2 = _text_config(hidden_size=16, hidden_act="gelu", num_hidden_layers=3)
    pipeline = StableDiffusionXLPipeline(
        vae=_sd_vae(sample_size=128, scaling_factor=0.13025, force_upcast=True),
        text_encoder=seeded(lambda: CLIPTextModel(config)),
        text_encoder_2=seeded(lambda: CLIPTextModelWithProjection(config_2)),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(pad_token="!"),
        unet=_unet(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, depth),
            norm_num_groups=4,
            cross_attention_dim=8 + 16,
            attention_head_dim=(1, 2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,  # pooled text and six time ids
        ),
        scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def _unet(**options: Any) -> UNet2DConditionModel:
    return seeded(lambda: UNet2DConditionModel(**{"sample_size": 8, **options}))


def _vae(*, block_out_channels: tuple[int, ...], **options: Any) -> AutoencoderKL:
    levels = len(block_out_channels)
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=4,
            **options,
        )
    )


def _sd_vae(**options: Any) -> AutoencoderKL:
    return _vae(block_out_channels=(8, 8, 16, 16), layers_per_block=2, norm_num_groups=4, **options)


def _text_config(*, hidden_size: int, **options: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=hidden_size,
        num_attention_heads=2,
        max_position_embeddings=77,
        # The published configs carry these, not the ids of the tokenizer.
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        **{"num_hidden_layers": 2, **options},
    )
