"""Measure the bundled CLIP baseline on held-out scenes and print JSON.

python tools/shapes/measure_clip.py
"""

import argparse
import json
from pathlib import Path

import torch
from train_clip import measure
from training import HELD_OUT_SEED
from transformers import CLIPModel, CLIPTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, default=Path("src/diffenc/backbones/assets/shapes-clip")
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = CLIPModel.from_pretrained(options.model)
    tokenizer = CLIPTokenizer.from_pretrained(options.model)
    found = measure(model, tokenizer, seed=HELD_OUT_SEED, batches=16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"parameters": parameters, **found}, indent=2))


if __name__ == "__main__":
    main()
