"""A plan of a training as tables on one page: `diffenc train CONFIG.toml --plan`."""

from typing import TYPE_CHECKING

import typer

from diffenc.cli.tables import print_table, readable_bytes

if TYPE_CHECKING:
    from diffenc.mllm.training.plan import Plan

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_WHOLE = "whole"


def print_plan(plan: "Plan") -> None:
    """Print what a run is told and what it will take."""
    from diffenc.mllm.training.memory import ASSUMPTIONS

    _print_run(plan)
    parts = [
        [name, _short(size), _short(plan.trained[name]) if name in plan.trained else "-"]
        for name, size in plan.parameters.items()
    ]
    print_table("parameters", ["part", "all", "trained"], parts, right=["all", "trained"])
    _print_memory(plan)
    _print_fits(plan)
    rows = [
        [each.part, each.name, each.repository or "nothing to fetch", _size(each.bytes)]
        for each in plan.downloads
    ]
    print_table("downloads", ["part", "name", "from", "size"], rows, right=["size"])
    lines = [[name, f"{size / 1e9:.2f} GB"] for name, size in plan.disk.items()]
    lines.append(["in all", f"{sum(plan.disk.values()) / 1e9:.2f} GB"])
    print_table("disk", ["use", "size"], lines, right=["size"])
    typer.echo(f"memory: {ASSUMPTIONS}")
    for warning in plan.warnings():
        typer.echo(f"note: {warning}")


def _print_run(plan: "Plan") -> None:
    guessed = " (told from letters: no tokenizer here)" if plan.estimated_text else ""
    guessed = " (assumed: no data was looked at)" if plan.assumed else guessed
    rows = [
        ["samples", f"{plan.data.samples:,}, {plan.data.text_only:,} without a picture"],
        ["pictures", f"{plan.data.images:,} of {plan.tokens_per_image} tokens"],
        ["text", f"{plan.text_tokens:.0f} tokens a sample{guessed}"],
        ["longest", f"{plan.longest:,} tokens; context {plan.context or 'unknown'}"],
        *[[name, text] for name, text in plan.settings.items()],
        ["steps", f"{plan.steps:,}"],
        ["processes", f"{plan.processes}, {plan.accumulation} batches a step each"],
        ["arithmetic", f"{_short(sum(plan.flops.values()))}FLOP a sample"],
        ["counted on", f"{_short(plan.rate)}FLOP/s a process: {plan.rate_source}"],
        ["time", _duration(plan.seconds)],
    ]
    print_table(f"plan: {plan.stage}", ["what", "how much"], rows)


def _print_memory(plan: "Plan") -> None:
    """What a process needs, for each value of `optim.shard`."""
    titles = {kind: _title(kind, plan.split_over) for kind in plan.memories}
    uses = list(dict.fromkeys(use for memory in plan.memories.values() for use in memory))
    rows = [
        [use, *[_gigabytes(memory.get(use)) for memory in plan.memories.values()]] for use in uses
    ]
    rows.append(["in all", *[_gigabytes(sum(each.values())) for each in plan.memories.values()]])
    rows += [[f"main memory: {who}", *_host(plan, size)] for who, size in plan.host.items() if size]
    heads = ["use", *titles.values()]
    print_table("memory of a process", heads, rows, right=heads[1:])


def _host(plan: "Plan", size: float) -> list[str]:
    """A size under what the config splits, and nothing under the rest."""
    return [_gigabytes(size) if kind == plan.shard else "-" for kind in plan.memories]


def _print_fits(plan: "Plan") -> None:
    """Which card holds how many of the samples that a process takes at a time."""
    rows = []
    for card, fits in plan.fits.items():
        cells = [_samples(fits[kind]) for kind in plan.memories]
        least = fits["processes"]
        rows.append([f"{card} GB", *cells, "-" if least is None else str(least)])
    heads = ["card", *[_title(kind, plan.split_over) for kind in plan.memories], "zero3 from"]
    print_table("samples at a time that fit", heads, rows, right=heads[1:])


def _title(kind: str, over: int) -> str:
    return _WHOLE if kind == "none" else f"{kind} over {over}"


def _samples(count: int | None) -> str:
    return str(count) if count else "none"


def _gigabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f} GB"


def _size(size: float) -> str:
    return readable_bytes(int(size)) if size else "-"


def _short(number: float) -> str:
    for unit, letter in _UNITS:
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return f"{number:.3g} "


def _duration(seconds: float) -> str:
    for unit, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds"
