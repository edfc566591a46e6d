"""Put the trained language model where it is bundled, in half precision.

    python tools/shapes/assemble_lm.py

Weights are stored as float16 while the config says float32, so that transformers brings them to
float32 on loading, as it does with the other parts of the miniature.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS = "model.safetensors"


def save_half(source: Path, target: Path) -> None:
    """Write the weights of a safetensors file as float16."""
    state = {key: value.to(torch.float16).contiguous() for key, value in load_file(source).items()}
    save_file(state, target, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("runs/shapes-lm/model"))
    parser.add_argument("--target", type=Path, default=Path("src/diffenc/models/assets/shapes-lm"))
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    save_half(options.source / WEIGHTS, options.target / WEIGHTS)
    for name in FILES:
        shutil.copy(options.source / name, options.target)
    size = (options.target / WEIGHTS).stat().st_size
    print(f"{size / 1e6:.1f} MB of weights in {options.target}")


if __name__ == "__main__":
    main()
