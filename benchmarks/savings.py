"""What each saving beyond the early exit is worth: arithmetic, and time where it is asked for.

    python benchmarks/savings.py --markdown docs/results/savings.md --json docs/results/savings.json

Operations are counted on the meta device from the real configs and need no weights. `--time` asks
a real size model with random weights questions with and without each saving, in turn, and gives
ratios of times: on a CPU of processor time, in float32. Times in the JSON file of models that are
not timed anew stay.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from speed.counting import MetaModel, operations
from speed.measuring import median
from speed.program import DTYPES, MODELS, built_folder, positive
from speed.saving_times import (
    BLANK,
    COMPILED,
    FURTHER,
    KEYS,
    OVER_PLAIN,
    PREFIX,
    ROWS,
    SAME_TEXT,
    WITHOUT_TEXT,
    Times,
    text_projections,
    time_savings,
)
from torch import nn

from diffenc.denoiser.attention import cross_attention_layers
from diffenc.denoiser.blank_texts import skipping_rows
from diffenc.denoiser.hooks import ForwardTaps
from diffenc.denoiser.replay import down_path, record, replayed, text_free_prefix
from diffenc.evals.tables import Table
from diffenc.models.presets import preset_options

SIZES = {"sd2.1-base": (512, 768), "sdxl": (512, 1024)}
TAPS: dict[str, tuple[str, ...]] = {
    "sd2.1-base": preset_options("dift", "sd")["taps"],
    "sdxl": preset_options("gdf", "sdxl")["taps"],
}
TIMED_SIZE, QUICK_SIZE = 512, 64
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
    """

    model: str
    size: int
    job: str
    saving: str
    before: int
    after: int
    exact: bool

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
    first = "first question, cfg"
    savings = []
    if "prefix" in rest:
        shared = whole - rest["prefix"]
        score = operations(partial(_until, model, unet, last))
        begun = operations(partial(_until, model, _known(model, parts["prefix"]), last))
        pairs = 20  # 2 x 2 at five timesteps
        unit = 2 * vae + 2 * text
        before = vae + text + 2 * whole
        savings += [
            make(first, PREFIX, before, before - shared, True),
            make(FURTHER, PREFIX, text + whole, text + whole - shared, True),
            make("2 x 2 scores, paper", PREFIX, unit + pairs * score,
                 unit + pairs * begun + pairs // 2 * (score - begun), True),
            make("8 x 32 scores, paper, passes", PREFIX, 32 * score,
                 32 * begun + score - begun, True),
        ]  # fmt: skip
    exact = text + rest.get("prefix", whole)
    if alias == "sdxl":
        copy = skipping_rows(unet, torch.zeros(1, dtype=torch.bool), read=TAPS[alias])
        skipped = whole - operations(partial(_until, model, copy, TAPS[alias]))
        for job, before in (
            (WITHOUT_TEXT, whole),
            ("features without a text", vae + whole),
            (first, vae + text + 2 * whole),
        ):
            savings.append(make(job, BLANK, before, before - skipped, True))
    states = torch.empty(1, 77, unet.config.cross_attention_dim, device="meta")
    projections = text_projections(unet, TAPS[alias])
    keys = operations(lambda: [layer(states) for layer in projections])
    same = text + ROWS * (exact - text)
    saved = (ROWS - 1) * keys
    for job, before in ((SAME_TEXT, same), (f"one text for {ROWS} new pictures, cond",
                                            same + ROWS * vae)):  # fmt: skip
        savings.append(make(job, KEYS, before, before - saved, True))
    savings.append(make(OVER_PLAIN, "all that is exact", plain, exact, True))
    for name in ("down", "middle"):
        for job, before in ((FURTHER, exact), (OVER_PLAIN, plain)):
            savings.append(make(job, f'reuse="{name}"', before, text + rest[name], False))
    return savings


def _until(model: MetaModel, unet: nn.Module, taps: Sequence[str]) -> None:
    with ForwardTaps(unet, taps, early_exit=True) as reader:
        reader.run(lambda: model.run(unet))


def _known(model: MetaModel, paths: tuple[str, ...]) -> nn.Module:
    return replayed(model.unet, record(model.unet, paths, lambda: model.run(model.unet)))


def table(savings: Sequence[Saving], times: Mapping[str, Times]) -> Table:
    """All savings, with what they leave out."""
    columns: tuple[str, ...] = ("job", "model", "size", "saving")
    columns += ("TFLOP before", "after", "saved", "x", *(["time, x"] if times else []))

    def ratio(saving: Saving) -> str:
        timed = times.get(saving.model)
        value = None
        if timed is not None and timed.size == saving.size:
            value = timed.ratio(saving.job, saving.saving)
        return "" if value is None else f"{value:.2f}"

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
            *([ratio(each)] if times else []),
        )
        for each in savings
    )
    return Table("Work of one job before and after each saving", columns, rows)


def seconds_table(times: Mapping[str, Times]) -> Table:
    """Median seconds of each call that was timed."""
    names = list(dict.fromkeys(name for each in times.values() for name in each.seconds))
    rows = tuple(
        (
            name,
            *(
                f"{median(each.seconds[name]):.2f}" if name in each.seconds else ""
                for each in times.values()
            ),
        )
        for name in names
    )
    heads = [f"{alias} at {each.size} px" for alias, each in times.items()]
    return Table("Seconds of one call, median", ("call", *heads), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    times = _times_before(options.json)
    savings = [each for alias, sizes in SIZES.items() for size in sizes
               for each in count(alias, size)]  # fmt: skip
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    for alias in options.time:
        # On a CPU half of the disk is enough: weights in bfloat16 are read into float32.
        kept = torch.bfloat16 if dtype == torch.float32 else dtype
        times[alias] = time_savings(
            built_folder(options.models, kept, options.quick, alias),
            TAPS[alias],
            size=QUICK_SIZE if options.quick else options.size,
            repeats=options.repeats,
            device=device,
            dtype=dtype,
            remark=options.remark,
            compiled=options.backend if options.compile else None,
        )
        times = {name: times[name] for name in SIZES if name in times}
        _write(options, savings, times)  # what is known if the next one fails
    print(_write(options, savings, times))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--time", nargs="+", choices=list(SIZES), default=[], metavar="MODEL",
        help=f"time these models: {', '.join(SIZES)}")  # fmt: skip
    add("--models", type=Path, default=MODELS, help="where models are built (%(default)s)")
    add("--repeats", type=positive, default=3, help="rounds of all calls (%(default)s)")
    add("--compile", action="store_true", help="time further questions of a compiled U-Net too")
    add("--backend", default="inductor", help="of torch.compile (%(default)s)")
    add("--size", type=positive, default=TIMED_SIZE, help="side of the pictures (%(default)s)")
    add("--remark", default="", help="what else is to be said of the machine, such as its load")
    add("--device", default="cuda" if cuda else "cpu", help="%(default)s")
    add("--dtype", choices=DTYPES, default="float16" if cuda else "float32", help="%(default)s")
    add("--quick", action="store_true", help=f"narrow models at {QUICK_SIZE} px: it runs, no more")
    add("--json", type=Path, metavar="FILE", help="write counts and times")
    add("--markdown", type=Path, metavar="FILE", help="write the page")
    return parser.parse_args(arguments)


def _times_before(file: Path | None) -> dict[str, Times]:
    if file is None or not file.exists():
        return {}
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))["times"]
        return {alias: Times(**each) for alias, each in kept.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise SystemExit(
            f"savings.py: {file} holds no times of this program; name another file, or remove it"
        ) from None


def _write(
    options: argparse.Namespace, savings: Sequence[Saving], times: Mapping[str, Times]
) -> str:
    """Write the files that were asked for; the page."""
    if options.json:
        report = {
            "savings": [asdict(each) for each in savings],
            "times": {alias: asdict(each) for alias, each in times.items()},
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page = _page(savings, times)
    if options.markdown:
        options.markdown.write_text(page, encoding="utf-8")
    return page


def _page(savings: Sequence[Saving], times: Mapping[str, Times]) -> str:
    small = [f"{e.job} ({e.model}, {e.size} px: {100 * e.share:.1f} %)" for e in savings
             if e.share < LEAST]  # fmt: skip
    start, end = (f"<!-- --8<-- [{side}:table] -->" for side in ("start", "end"))
    parts = [_HEAD, start, table(savings, times).to_markdown(), end]
    if small:
        parts.append(f"Below {100 * LEAST:g} % of the job: {'; '.join(small)}.")
    if times:
        parts += [seconds_table(times).to_markdown(), *map(_how_timed, times.items())]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _how_timed(timed: tuple[str, Times]) -> str:
    alias, times = timed
    count = len(next(iter(times.seconds.values())))
    rounds = "1 round" if count == 1 else f"{count} rounds"
    ratio = times.ratio(FURTHER, COMPILED)
    compiled = "" if ratio is None else f" Compiled, a further question is {ratio:.2f} x as fast."
    return (
        f"* {alias}: {times.machine}; {rounds}. Exact features differ from those of the plain "
        f"script by {times.difference:.1g} of the largest magnitude at a tap.{compiled}"
    )


_HEAD = """\
# What is computed once for several questions

`python benchmarks/savings.py --time MODEL --markdown docs/results/savings.md
--json docs/results/savings.json`

Operations of one job, counted from the real configs: a multiplication and an addition are two.
Each row stands alone: it is held against the same job without this saving. The taps are those of
`dift` (SD 2.1) and `gdf` (SDXL). The plain script hooks the stock pipeline, encodes picture and
text anew for every question and runs the whole U-Net under the text and under none. Times are of
real sizes with random weights, in turn in one process; on a CPU processor time.

Keys and values of a text that several rows share are projected for each row: once per text would
save more than 2 % for SDXL at 512 px alone, and there only for pictures that were asked about
before, so it is not built.
"""

if __name__ == "__main__":
    sys.exit(main())
