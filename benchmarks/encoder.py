"""What an answer of the encoder costs, against plain diffusers and against the bare floor.

    python benchmarks/encoder.py --json encoder.json

Stable Diffusion 2.1 and SDXL at real size with seeded random weights, which are built once (4 GB
and 7 GB on disk in half precision); nothing is downloaded. `--quick` takes narrow twins and small
pictures and ends in a minute: it shows that everything runs, and its times mean nothing.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from speed.cases import CASES, Case
from speed.measuring import Deadline
from speed.program import (
    Setting,
    bench_options,
    common_options,
    positive,
    start,
    write_report,
)
from speed.running import EncoderBench, measure
from speed.tables import Row, markdown, print_rows

COMPILE_SECONDS = 150
"""Left before the deadline for a case to be compiled; less is not enough for a real U-Net."""

MOST_REPEATS = 20
GPU_SECONDS, CPU_SECONDS = 20, 120
"""Of calls per case and batch, after which there are no more repeats but the first three."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common_options(__doc__, CASES, most_repeats=MOST_REPEATS)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--batches", type=_sizes, metavar="N,N", help="pictures per call: 1 on a CPU, else 1,8,32")
    add("--compile", action=switch, help="time diffenc compiled too, as by default on CUDA")
    add("--backend", default="inductor", help="of torch.compile")
    add("--memory", action=switch, default=True, help="measure peaks")
    return parser.parse_args(arguments)


def _sizes(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    return start(parse(arguments), _run)


def _run(options: argparse.Namespace, setting: Setting) -> None:
    seconds = (GPU_SECONDS, CPU_SECONDS)
    bench = EncoderBench(
        **bench_options(options, setting, most_repeats=MOST_REPEATS, seconds=seconds),
        memory=options.memory,
        options={"backend": options.backend},
    )
    compiled = setting.on_gpu if options.compile is None else options.compile
    batches = options.batches or ([1, 8, 32] if setting.on_gpu else [1])
    deadline, rows = Deadline(options.budget), list[Row]()
    for case, batch, kind in _jobs(options.cases, batches, compiled):
        if _in_time(bench, case, batch, kind, deadline):
            found = measure(bench, case, batch=batch, compiled=kind)
            rows += found[1:] if kind else found  # eager diffenc has a row already
        rows.sort(key=lambda row: (list(CASES).index(row.case), row.batch))
        # What is known if the next one fails.
        table = markdown(rows, setting.head, bench.notes)
        write_report(options, setting, bench.notes, rows, table)
    console = Console(width=None if sys.stdout.isatty() else 160)
    print_rows(rows, setting.head, bench.notes, console)


def _jobs(
    cases: Sequence[str], batches: Sequence[int], compiled: bool
) -> list[tuple[Case, int, bool]]:
    """Case, batch size and whether it is compiled: that comes last, when time may run out."""
    return [
        (case, batch, kind)
        for kind in ((False, True) if compiled else (False,))
        for name, case in CASES.items()
        if name in cases
        for batch in (batches if case.batched else [1])
    ]


def _in_time(
    bench: EncoderBench, case: Case, batch: int, compiled: bool, deadline: Deadline
) -> bool:
    what = f"{case.name}, batch {batch}{', compiled' if compiled else ''}"
    if deadline.left() < (COMPILE_SECONDS if compiled and not bench.quick else 0):
        bench.notes.append(f"{what}: not run, the time was up")
        return False
    print(f"{what} ...", file=sys.stderr, flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
