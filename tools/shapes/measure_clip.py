"""Measure the bundled CLIP baseline on held-out scenes and print JSON.

    python tools/shapes/measure_clip.py

`one_of_64` is the percentage of pictures for which the caption that was drawn for them is found
among 64 that are worded differently; `one_of_64_meanings` the same among 64 that say different
things ("a photo of a red star" and "we see a red star" do not). Captions leave things out, so that
others of the 64 are often true of the picture as well: `true_of_64` counts any that is, by the
reader that the tests check captions with. With `--crowds` scenes of five to nine objects are asked
about too, and what one linear layer reads of a patch.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from patches import truths
from torch.nn import functional as F
from train_clip import different_captions, measure, pixels, similarities
from training import HELD_OUT_SEED
from transformers import CLIPModel, CLIPTokenizer

from diffenc.shapes.crowds import sample_crowds
from diffenc.shapes.scenes import COLORS, SHAPES

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from shapes_oracle import is_true  # type: ignore[import-not-found]

BATCHES = 16


@torch.no_grad()
def true_of_64(model: CLIPModel, tokenizer: CLIPTokenizer, crowds: float = 0.0) -> float:
    """Percentage of pictures for which a true caption is chosen."""
    right = 0
    for index in range(BATCHES):
        scenes, texts = different_captions(64, f"clip/{HELD_OUT_SEED + index}", crowds=crowds)
        chosen = similarities(model, tokenizer, scenes, texts).argmax(dim=1).tolist()
        right += sum(is_true(texts[k], scene) for k, scene in zip(chosen, scenes, strict=True))
    return round(100 * right / (64 * BATCHES), 1)


@torch.no_grad()
def read_of_patches(model: CLIPModel, fit: int = 80, test: int = 40) -> dict[str, float]:
    """Percentages of patches of crowds whose object's shape and colour a linear layer names."""
    scenes = list(sample_crowds(fit + test, seed=HELD_OUT_SEED))
    config = model.config.vision_config
    side = config.image_size // config.patch_size
    states = model.vision_model(
        pixel_values=pixels(scenes, config.image_size), output_hidden_states=True
    ).hidden_states[-2][:, 1:]
    truth = truths(scenes, side)
    states = torch.cat([states, torch.ones(*states.shape[:2], 1)], dim=2)
    there = truth[..., 0] > 0
    shares = {}
    for name, kind, words in (("patch_shape", 0, SHAPES), ("patch_color", 1, COLORS)):
        known, unseen = states[:fit][there[:fit]], states[fit:][there[fit:]]
        right = F.one_hot(truth[:fit][there[:fit]][:, kind] - 1, len(words)).float()
        gram = known.T @ known + torch.eye(known.shape[1])
        read = (unseen @ torch.linalg.solve(gram, known.T @ right)).argmax(1) + 1
        correct = (read == truth[fit:][there[fit:]][:, kind]).float().mean()
        shares[name] = round(100 * correct.item(), 1)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("src/diffenc/models/assets/shapes-clip"))
    parser.add_argument("--crowds", action="store_true", help="crowded scenes too")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = CLIPModel.from_pretrained(options.model)
    tokenizer = CLIPTokenizer.from_pretrained(options.model)
    found = measure(model, tokenizer, seed=HELD_OUT_SEED, batches=BATCHES)
    found["true_of_64"] = true_of_64(model.eval(), tokenizer)
    if options.crowds:
        found["true_of_64_crowds"] = true_of_64(model, tokenizer, crowds=1.0)
        found |= read_of_patches(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"parameters": parameters, **found}, indent=2))


if __name__ == "__main__":
    main()
