"""Diffusers folders at real size with seeded random weights, for benchmarks and slow tests.

    python benchmarks/real_size.py sd2.1-base models/sd2.1-base --dtype bfloat16

No download is needed: architectures come from diffenc's bundled configs. Weights of convolutions
and linear layers are scaled by a half, so that activations stay finite in half precision. The
stock pipelines of diffusers load these folders too.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import nn

from diffenc.models.building import build_part
from diffenc.models.configs import known_architecture
from diffenc.models.shapes import shapes_folder

GAIN = 0.5
NARROW = 8
"""How many times fewer channels the narrow twins have; it divides the widths of all models."""

_WIDTHS = {
    "unet": (
        "block_out_channels",
        "cross_attention_dim",
        "norm_num_groups",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    ),
    "vae": ("block_out_channels", "norm_num_groups"),
    "text_encoder": ("hidden_size", "intermediate_size", "projection_dim"),
    "text_encoder_2": ("hidden_size", "intermediate_size", "projection_dim"),
}


def build_folder(
    alias: str, folder: Path, *, dtype: torch.dtype = torch.float32, narrow: bool = False
) -> Path:
    """Write the model `alias` with random weights to `folder`; nothing is done where it exists.

    The tokenizer is the bundled miniature's, with the published limit of 77 tokens.

    Args:
        alias: "sd1.5", "sd2.1-base", "sd2.1" or "sdxl".
        folder: Made where it is missing.
        dtype: The weights are drawn in it, so that no copy in float32 is needed.
        narrow: All layers, with an eighth of the channels: built in seconds.
    """
    known = known_architecture(alias)
    if known is None:
        raise ValueError(f"no bundled architecture for {alias!r}")
    if (folder / "model_index.json").exists():
        return folder
    configs = {part: _narrowed(part, c) if narrow else c for part, c in known.configs.items()}
    for part, config in configs.items():
        if part == "scheduler":
            schedule = DDPMScheduler(**config, clip_sample=False, steps_offset=1)
            schedule.save_pretrained(folder / part)
            continue
        model: Any = seeded_part(part, config, dtype)
        model.save_pretrained(folder / part)
    tokenizers = ["tokenizer", "tokenizer_2"] if known.family == "sdxl" else ["tokenizer"]
    for name in tokenizers:
        _write_tokenizer(folder / name)
    # Last: a folder that was left half written has no index, and is written again.
    index = json.dumps(_model_index(xl=known.family == "sdxl"), indent=2)
    (folder / "model_index.json").write_text(index + "\n")
    return folder


def _narrowed(part: str, config: dict[str, Any]) -> dict[str, Any]:
    def less(value: Any) -> Any:
        return [less(each) for each in value] if isinstance(value, list) else value // NARROW

    widths = _WIDTHS.get(part, ())
    return {key: less(value) if key in widths else value for key, value in config.items()}


def _model_index(*, xl: bool) -> dict[str, Any]:
    kind = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    index: dict[str, Any] = {
        "_class_name": kind,
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if xl:
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        return {**index, "force_zeros_for_empty_prompt": True}
    return {**index, "safety_checker": [None, None], "requires_safety_checker": False}


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def seeded_part(
    part: str, config: Mapping[str, Any], dtype: torch.dtype, family: str | None = None
) -> Any:
    """A part of a model with seeded random weights, drawn in a dtype; see `build_part`."""
    with torch.random.fork_rng(devices=[]), _made_in(dtype):
        torch.manual_seed(0)
        model = build_part(part, config, family)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.mul_(GAIN)
    return model.eval()


def _write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    source = shapes_folder() / "tokenizer"
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (folder / name).write_text((source / name).read_text(encoding="utf-8"), encoding="utf-8")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["model_max_length"] = 77
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("alias", choices=["sd1.5", "sd2.1-base", "sd2.1", "sdxl"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--narrow", action="store_true", help="an eighth of the channels")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    build_folder(options.alias, options.folder, dtype=dtype, narrow=options.narrow)


if __name__ == "__main__":
    main()
