"""Measure the bundled CLIP baseline on held-out scenes and print JSON.

    python tools/shapes/measure_clip.py

`one_of_64` is the percentage of pictures for which the caption that was drawn for them is found
among 64 that are worded differently; `one_of_64_meanings` the same among 64 that say different
things ("a photo of a red star" and "we see a red star" do not). Captions leave things out, so that
others of the 64 are often true of the picture as well: `true_of_64` counts any that is, by the
reader that the tests check captions with.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from train_clip import different_captions, measure, similarities
from training import HELD_OUT_SEED
from transformers import CLIPModel, CLIPTokenizer

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from shapes_oracle import is_true  # type: ignore[import-not-found]

BATCHES = 16


@torch.no_grad()
def true_of_64(model: CLIPModel, tokenizer: CLIPTokenizer) -> float:
    """Percentage of pictures for which a true caption is chosen."""
    right = 0
    for index in range(BATCHES):
        scenes, texts = different_captions(64, f"clip/{HELD_OUT_SEED + index}")
        chosen = similarities(model, tokenizer, scenes, texts).argmax(dim=1).tolist()
        right += sum(is_true(texts[k], scene) for k, scene in zip(chosen, scenes, strict=True))
    return round(100 * right / (64 * BATCHES), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("src/diffenc/models/assets/shapes-clip"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = CLIPModel.from_pretrained(options.model)
    tokenizer = CLIPTokenizer.from_pretrained(options.model)
    found = measure(model, tokenizer, seed=HELD_OUT_SEED, batches=BATCHES)
    found["true_of_64"] = true_of_64(model.eval(), tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"parameters": parameters, **found}, indent=2))


if __name__ == "__main__":
    main()
