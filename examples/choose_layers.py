# %% [markdown]
# # Weighing layers on a validation split
# Not every cross-attention tells right from wrong. `fit_layers` weighs them on items whose truth is
# known; what the weights are worth shows on other items alone, in several trials with other items
# and other noise. The denoising error, which needs a whole pass per pair, stands beside.

# %%
import argparse
import sys
from collections.abc import Sequence
from statistics import mean, stdev

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from diffenc import CrossAttnScorer
from diffenc.evals.matching.metrics import METRICS, Metric, correct
from diffenc.shapes import render, sample_scenes
from diffenc.shapes.pairs import winoground_items

parser = argparse.ArgumentParser(description="Layer weights chosen on a validation split.")
parser.add_argument("--backbone", default="shapes")
parser.add_argument("--fit", type=int, default=20, help="validation items per kind and trial")
parser.add_argument("--test", type=int, default=16, help="other items per kind and trial")
parser.add_argument("--trials", type=int, default=3)
parser.add_argument("--references", type=int, default=6, help="scenes to calibrate by")
parser.add_argument("--layers", nargs="+", help="cross-attentions or blocks; all by default")
options = parser.parse_args([] if hasattr(sys, "ps1") else None)  # a notebook has no options

Item = tuple[list[Image.Image], list[str]]
VALIDATION, TEST, REFERENCES = 810_000, 970_000, 820_000  # seeds of scenes: no two share one

# %% [markdown]
# Items are Winoground-like: two pictures, two texts, the same words in another order or one word
# changed. Text k is true of picture k alone.


# %%
def items(per_kind: int, seed: int) -> list[Item]:
    pairs = winoground_items(per_kind, seed=seed)
    return [([render(scene) for scene in pair.scenes], list(pair.captions)) for pair in pairs]


def accuracy(scorer: CrossAttnScorer, tested: Sequence[Item], seed: int) -> dict[Metric, float]:
    scores = torch.stack([scorer(images, texts, seed=seed) for images, texts in tested])
    return {name: 100 * hits.float().mean().item() for name, hits in correct(scores).items()}


# %% [markdown]
# Weights belong to the mode and the calibration that they were chosen with, so each has its own.

# %%
scorer = CrossAttnScorer.from_pretrained(options.backbone)
size = scorer.backbone.default_size
scenes = [render(scene, size) for scene in sample_scenes(options.references, seed=REFERENCES)]
layers = {} if options.layers is None else {"layers": options.layers}
contenders = {
    "every layer alike": scorer.with_options(preset="calibrated", **layers),
    "layers weighed": scorer.with_options(preset="calibrated", **layers),
}
for name, contender in list(contenders.items()):
    contenders[f"shared-query, {name}"] = contender.with_options(mode="shared-query")
for contender in contenders.values():
    contender.calibrate(scenes)
contenders["denoising error"] = scorer.with_options(preset="diffusion-classifier")
found: dict[str, list[dict[Metric, float]]] = {name: [] for name in contenders}
weights: dict[str, list[tuple[float, ...]]] = {}
for trial in track(range(options.trials), "trials", console=Console(stderr=True), transient=True):
    fitted, tested = items(options.fit, VALIDATION + trial), items(options.test, TEST + trial)
    for name, contender in contenders.items():
        if name.endswith("weighed"):
            weights.setdefault(name, []).append(contender.fit_layers(fitted, seed=trial))
        found[name].append(accuracy(contender, tested, seed=trial))
    scorer.clear_cache()

# %%
table = Table(*("score", *METRICS), title="percent right on items that nothing was chosen on")
for name, results in found.items():
    cells = []
    for metric in METRICS:
        values = [result[metric] for result in results]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.1f}{spread}")
    table.add_row(name, *cells)
console = Console()
console.print(table)
for name, chosen in weights.items():
    console.print(f"{name}: mean weight over trials")
    each = zip(contenders[name].layers, *chosen, strict=True)
    for layer, *values in sorted(each, key=lambda row: -sum(row[1:])):
        console.print(f"  {mean(values):.2f}  {layer}")
