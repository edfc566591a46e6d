"""What each saving beyond the early exit is worth: arithmetic, and time where it is asked for.

    python benchmarks/savings.py --markdown docs/results/savings.md --json docs/results/savings.json

Operations are counted on the meta device from the real configs and need no weights. `--time` asks
a real size model with random weights the same question with and without each saving, in turn, and
gives the ratio of processor times; `--models` says where models lie or are built.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from real_size import build_folder
from speed.counting import MetaModel, operations
from torch import nn

from diffenc import DiffusionEncoder
from diffenc.config import EncoderConfig
from diffenc.denoiser.attention import cross_attention_layers
from diffenc.denoiser.hooks import ForwardTaps
from diffenc.denoiser.replay import down_path, record, replayed, text_free_prefix
from diffenc.evals.tables import Table
from diffenc.models.presets import preset_options

SIZES = {"sd2.1-base": (512, 768), "sdxl": (512, 1024)}
TAPS: dict[str, tuple[str, ...]] = {
    "sd2.1-base": preset_options("dift", "sd")["taps"],
    "sdxl": preset_options("gdf", "sdxl")["taps"],
}
LEAST = 0.02
"""Share of the work below which a saving is not worth its code."""


@dataclass(frozen=True, slots=True)
class Saving:
    """One job with and without one saving.

    Attributes:
        model: Alias of the architecture.
        size: Side of the pictures, in pixels.
        job: What is asked.
        saving: What is left out.
        before: Operations without the saving.
        after: Operations with it.
        exact: Whether the answer stays the same.
        time_ratio: Median of processor time before over after, or None where it was not timed.
    """

    model: str
    size: int
    job: str
    saving: str
    before: int
    after: int
    exact: bool
    time_ratio: float | None = None

    @property
    def share(self) -> float:
        """Part of the work that is saved."""
        return 1 - self.after / self.before


def count(alias: str, size: int) -> list[Saving]:
    """Savings of a model at a size, by arithmetic."""
    model = MetaModel(alias, size)
    unet = model.unet
    works = model.arithmetic(partial(_until, model, unet, TAPS[alias]))
    text, vae, whole = works.text, works.vae, works.unet_exit
    parts = {"prefix": text_free_prefix(unet), "down": down_path(unet)}
    parts["middle"] = down_path(unet, middle=True)
    rest = {
        name: operations(partial(_until, model, _known(model, paths), TAPS[alias]))
        for name, paths in parts.items()
        if paths
    }
    last = (f"{cross_attention_layers(unet)[-1]}.to_q",)
    plain = vae + 2 * text + 2 * works.unet if alias != "sdxl" else vae + text + 2 * works.unet
    make = partial(Saving, alias, size)
    first, further = "first question, cfg", "further question, cfg"
    savings = []
    if "prefix" in rest:
        shared = whole - rest["prefix"]
        prefix = "prefix without text once"
        score = operations(partial(_until, model, unet, last))
        begun = operations(partial(_until, model, _known(model, parts["prefix"]), last))
        pairs = 20  # 2 x 2 at five timesteps
        unit = 2 * vae + 2 * text
        before = vae + text + 2 * whole
        savings += [
            make(first, prefix, before, before - shared, True),
            make(further, prefix, text + whole, text + whole - shared, True),
            make("2 x 2 scores, paper", prefix, unit + pairs * score,
                 unit + pairs * begun + pairs // 2 * (score - begun), True),
            make("8 x 32 scores, paper, passes", prefix, 32 * score,
                 32 * begun + score - begun, True),
        ]  # fmt: skip
    exact = text + rest.get("prefix", whole)
    for name in ("down", "middle"):
        savings.append(make(further, f'reuse="{name}"', exact, text + rest[name], False))
        savings.append(make(f"{further}, over the plain script", f'reuse="{name}"', plain,
                          text + rest[name], False))  # fmt: skip
    return savings


def _until(model: MetaModel, unet: nn.Module, taps: Sequence[str]) -> None:
    with ForwardTaps(unet, taps, early_exit=True) as reader:
        reader.run(lambda: model.run(unet))


def _known(model: MetaModel, paths: tuple[str, ...]) -> nn.Module:
    return replayed(model.unet, record(model.unet, paths, lambda: model.run(model.unet)))


def time_further(folder: Path, alias: str, repeats: int) -> dict[str, float]:
    """Ratios of processor time of a further question at 512 pixels, each against one saving less.

    Args:
        folder: Folder of the model.
        alias: Alias of its architecture.
        repeats: Number of rounds, in which all take turns.
    """
    taps = TAPS[alias]
    config = EncoderConfig(taps=taps, timestep=261, size=512, conditioning="cfg")
    exact = DiffusionEncoder.from_pretrained(folder, dtype=torch.float32, **config.to_dict())
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 512, 512), generator=generator, dtype=torch.uint8)
    parts = ("down", "middle")
    encoders = {
        f'reuse="{part}"': DiffusionEncoder(exact.backbone, replace(config, reuse=part))  # type: ignore[arg-type]
        for part in parts
    }
    for encoder in (exact, *encoders.values()):
        encoder.extract(image, "warm")
    times: dict[str, list[float]] = {}

    def clock(name: str, encoder: DiffusionEncoder, question: int) -> None:
        start = time.process_time()
        encoder.extract(image, f"question {question}")
        times.setdefault(name, []).append(time.process_time() - start)

    for question in range(repeats):
        with patch("diffenc.passes.reuse.text_free_prefix", lambda _: ()):
            clock("whole", exact, 3 * question)
        clock("exact", exact, 3 * question + 1)
        for name, encoder in encoders.items():
            clock(name, encoder, 3 * question + 2)
            exact.backbone.caches.prompts.clear()  # a text of its own for each
    ratio = {name: statistics.median(each) for name, each in times.items()}
    against = {'reuse="down"': "exact", 'reuse="middle"': "exact"}
    if text_free_prefix(exact.backbone.denoiser):
        against["prefix without text once"] = "whole"
    named = {"prefix without text once": "exact"}
    return {name: ratio[before] / ratio[named.get(name, name)] for name, before in against.items()}


def table(savings: Sequence[Saving]) -> Table:
    """All savings, with what they leave out."""
    is_timed = any(each.time_ratio is not None for each in savings)
    columns: tuple[str, ...] = ("job", "model", "size", "saving")
    columns += ("TFLOP before", "after", "saved", "x", *(["time, x"] if is_timed else []))
    rows: tuple[tuple[str, ...], ...] = tuple(
        (
            each.job,
            each.model,
            str(each.size),
            each.saving + ("" if each.exact else ", approximate"),
            f"{each.before / 1e12:.3f}",
            f"{each.after / 1e12:.3f}",
            f"{100 * each.share:.1f} %",
            f"{each.before / each.after:.2f}",
            *([_ratio(each)] if is_timed else []),
        )
        for each in savings
    )
    return Table("Work of one job before and after each saving", columns, rows)


def _ratio(saving: Saving) -> str:
    return "" if saving.time_ratio is None else f"{saving.time_ratio:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--time", nargs="+", choices=list(SIZES), default=[], metavar="MODEL")
    parser.add_argument("--models", type=Path, help="folder in which models are built, with --time")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    if options.time and options.models is None:
        parser.error("--time needs --models, a folder with room for them (sdxl: 7 GB)")
    savings = [each for alias, sizes in SIZES.items() for size in sizes
               for each in count(alias, size)]  # fmt: skip
    for alias in options.time:
        folder = build_folder(alias, options.models / "bfloat16" / alias, dtype=torch.bfloat16)
        ratios = time_further(folder, alias, options.repeats)
        savings = [_timed(each, alias, ratios) for each in savings]
    text = table(savings).to_markdown()
    print(text)
    if options.json:
        rows: list[dict[str, Any]] = [asdict(each) for each in savings]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(_page(text, savings), encoding="utf-8")
    return 0


def _timed(saving: Saving, alias: str, ratios: dict[str, float]) -> Saving:
    fits = (saving.model, saving.size, saving.job) == (alias, 512, "further question, cfg")
    return replace(saving, time_ratio=ratios.get(saving.saving)) if fits else saving


def _page(text: str, savings: Sequence[Saving]) -> str:
    small = sorted({f"{each.job} ({each.model})" for each in savings if each.share < LEAST})
    note = f"Below {100 * LEAST:g} % of the job: {', '.join(small)}.\n" if small else ""
    start, end = (f"<!-- --8<-- [{side}:table] -->" for side in ("start", "end"))
    return f"{_HEAD}\n{start}\n\n{text}\n{end}\n\n{note}".rstrip() + "\n"


_HEAD = """\
# What is computed once for several questions

`python benchmarks/savings.py --markdown docs/results/savings.md --json docs/results/savings.json`

Operations of one job, counted from the real configs: a multiplication and an addition are two.
Each row stands alone: it is held against the same job without this saving. The taps are those of
`dift` (SD 2.1) and `gdf` (SDXL). Time, where it was taken (`--time`): processor time of the job
before over after, float32, one core, random weights, in turn in one process.
"""

if __name__ == "__main__":
    sys.exit(main())
