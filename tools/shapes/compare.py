"""Measure bundled models of one world side by side: a table in Markdown, and all figures as JSON.

    python tools/shapes/compare.py shapes shapes-dit --items 100 --output runs/compare.json

Each model gets the same held-out scenes, noise and texts; layers and taps are chosen on validation
scenes. Pairs and shape words are those of `measure.py`. What a text turns is measured on scenes of
three objects that differ in colour and in shape, one of which is named by its colour.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ground_lora import MEASURES, measured
from measure import localisation, winoground
from measure_crowds import BATCH

from diffenc import DiffusionEncoder, EncoderConfig
from diffenc.denoiser.transformers import layout_of
from diffenc.evals.tables import Table
from diffenc.models import describe, load_backbone
from diffenc.models.arithmetic import pass_operations
from diffenc.models.base import Backbone

TIMESTEP = 50
KINDS = {"noun": "a noun or colour differs", "color": "colours exchanged", "relation": "relation"}


def taps_of(backbone: Backbone) -> tuple[str, ...]:
    """The blocks of a transformer; of a U-Net the outputs of its attentions."""
    config = dict(backbone.denoiser.config)
    if (layout := layout_of(config)) is not None:
        return tuple(layout.block(config, index) for index in range(layout.depth(config)))
    names = [name for name, _ in backbone.denoiser.named_modules()]
    return tuple(name for name in names if name.rpartition(".")[0].endswith(".attentions"))


def figures(name: str, items: int) -> dict[str, Any]:
    backbone = load_backbone(name)
    config = EncoderConfig(taps=taps_of(backbone), timestep=TIMESTEP, batch_size=BATCH)
    encoder = DiffusionEncoder(backbone, config)
    return {
        "parameters": sum(weight.numel() for weight in backbone.denoiser.parameters()),
        "operations": pass_operations(describe(name).denoiser_config, 16)[0],
        "milliseconds": one_pass(backbone),
        "pairs": winoground(backbone, items),
        "shape words": localisation(backbone, items),
        **measured(encoder, items, list(MEASURES)),
    }


@torch.no_grad()
def one_pass(backbone: Backbone, rows: int = 16, times: int = 7) -> float:
    """Processor time of a pass a row, the least of several."""
    latents = torch.zeros(rows, 4, 16, 16, dtype=torch.float32, device="cpu")
    embeds = backbone.embed(["a red circle left of a blue square"] * rows, size=(64, 64))
    spent = []
    for _ in range(times):
        begun = time.process_time()
        backbone.denoise(latents, TIMESTEP, embeds)
        spent.append(time.process_time() - begun)
    return round(1000 * min(spent) / rows, 2)


def rows_of(found: Mapping[str, Any]) -> dict[str, str]:
    """What a page says of a model, by its row."""
    rows = {
        "parameters of the denoiser, M": f"{found['parameters'] / 1e6:.1f}",
        "GFLOP a pass": f"{found['operations'] / 1e9:.2f}",
        "ms of processor time a pass": f"{found['milliseconds']:.1f}",
    }
    for kind, what in KINDS.items():
        scores = found["pairs"][kind]
        shown = " / ".join(f"{scores[part]:.0f}" for part in ("text", "image", "group"))
        rows[f"denoising score, text / image / group, {what}, %"] = shown
    best = found["shape words"]["best"]
    rows["maximum of a shape word's map on its object, %"] = place(best)
    for key, what in (
        ("color, by color", "of the colour word's, in “the red object”"),
        ("color, by object", "of the word “object”'s"),
    ):
        parts = found[f"maximum on its object, {key}"]
        for group, label in (("taught", "taught layers"), ("untouched", "other layers")):
            rows[f"{what}, {label}, %"] = place(parts[group])
    changes = found["change, color"]
    tap = max(changes, key=lambda name: changes[name]["won_percent"])
    shown = "{asked:.1f} / {control:.1f}, {won_percent:.0f}".format(**changes[tap])
    rows["change inside the object over the rest: asked / control, won %"] = f"{shown} (`{tap}`)"
    for key, what in (
        ("one token, color, by object", "“object”"),
        ("one token, color, by color", "the colour word"),
    ):
        tokens = found[key]
        tap = max(tokens, key=lambda name: tokens[name]["word"])
        shown = "{mean:.0f} / {word:.0f} / {mask:.0f}".format(**tokens[tap])
        rows[f"shape named from one token, %: mean / of {what} / mask"] = f"{shown} (`{tap}`)"
    return rows


def place(best: Mapping[str, Any]) -> str:
    layer = str(best["layer"]).removesuffix(".transformer_blocks.0.attn2").removesuffix(".attn2")
    return f"{best['percent']:.0f} (`{layer}`, t = {best['timestep']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/compare.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    for name in options.models:
        found[name] = figures(name, options.items)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(name, json.dumps(found[name]), flush=True)
    columns = {name: rows_of(each) for name, each in found.items()}
    labels = list(next(iter(columns.values())))
    rows = tuple((label, *(column[label] for column in columns.values())) for label in labels)
    print(Table("the same scenes, noise and texts", ("", *columns), rows).to_markdown())


if __name__ == "__main__":
    main()
