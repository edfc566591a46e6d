"""Diffusers folders at real size with seeded random weights, for benchmarks and slow tests.

    python benchmarks/real_size.py sd2.1-base models/sd2.1-base --dtype bfloat16

No download is needed: architectures come from diffenc's bundled configs. Weights of convolutions
and linear layers are scaled by a half, so that activations stay finite in half precision.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffenc.backbones.configs import known_architecture
from diffenc.backbones.shapes import shapes_folder

GAIN = 0.5


def build_folder(alias: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model `alias` with random weights to `folder`; nothing is done where it exists.

    The tokenizer is the bundled miniature's, with the published limit of 77 tokens.
    """
    known = known_architecture(alias)
    if known is None:
        raise ValueError(f"no bundled architecture for {alias!r}")
    configs = known.configs
    if (folder / "model_index.json").exists():
        return folder
    builders: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
        "unet": UNet2DConditionModel.from_config,
        "vae": AutoencoderKL.from_config,
        "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
        "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    }
    for part, config in configs.items():
        if part == "scheduler":
            DDPMScheduler(**config).save_pretrained(folder / part)
            continue
        model: Any = _seeded(partial(builders[part], config))
        model.to(dtype).save_pretrained(folder / part)
    tokenizers = ["tokenizer", "tokenizer_2"] if "text_encoder_2" in configs else ["tokenizer"]
    for name in tokenizers:
        _write_tokenizer(folder / name)
    xl = "text_encoder_2" in configs
    index = {"_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index) + "\n")
    return folder


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
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
    options = parser.parse_args()
    build_folder(options.alias, options.folder, dtype=getattr(torch, options.dtype))


if __name__ == "__main__":
    main()
