"""What scores of images and texts cost, against the released way and against the bare floor.

    python benchmarks/scorer.py --json scorer.json

Stable Diffusion 2.1 and SDXL at real size with seeded random weights, which are built once (4 GB
and 7 GB on disk in half precision); nothing is downloaded. `--quick` takes narrow twins and small
pictures and ends in a minute: it shows that everything runs, and its times mean nothing.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from encoder import DTYPES, MODELS, built_folder, describe_machine, positive
from rich.console import Console
from speed.measuring import fast_dtype, matrix_rate
from speed.running import Deadline, DisagreementError
from speed.score_cases import SCORE_CASES
from speed.score_running import ScoreBench, measure_scores
from speed.score_tables import COLUMNS, ScoreRow, explanation, tables
from speed.tables import markdown_tables, print_tables

from diffenc.backbones.device import check_placement
from diffenc.cli.options import quiet_libraries
from diffenc.errors import DiffencError

MOST_REPEATS = 10
GPU_SECONDS, CPU_SECONDS = 30, 300
"""Of calls per case, after which there are no more repeats but the first three."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--cases", nargs="+", choices=list(SCORE_CASES), default=list(SCORE_CASES), metavar="CASE",
        help=f"any of {', '.join(SCORE_CASES)}; all by default")  # fmt: skip
    add("--device", help="cpu or cuda; cuda by default where there is one")
    add("--dtype", choices=DTYPES, help="float16 on CUDA; on a CPU bfloat16 where it is fast")
    add("--pairs", type=positive, default=4,
        help="pairs that the released way is timed on: its time is multiplied (4)")  # fmt: skip
    add("--batch-size", type=positive, help="rows per call of the U-Net: 5 on a CPU, else 20")
    add("--repeats", type=positive, help="timed calls of each; 3 to 10 by the time they take")
    add("--threads", type=positive, help="of torch on a CPU")
    add("--models", type=Path, help=f"where models are built ({MODELS})")
    add("--quick", action="store_true", help="narrow models and small pictures, in a minute")
    add("--budget", type=float, metavar="SECONDS", help="begin no case after this long")
    add("--json", type=Path, metavar="FILE", help="write the rows")
    add("--markdown", type=Path, metavar="FILE", help="write the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    quiet_libraries()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = getattr(torch, options.dtype) if options.dtype else fast_dtype(device)
        check_placement(device, dtype)
    except (DiffencError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        models = options.models or (Path(scratch) if options.quick else MODELS)
        return _run(options, device, dtype, models)


def _run(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype, models: Path
) -> int:
    on_gpu = device.type == "cuda"
    rate = matrix_rate(device, dtype)
    bench = ScoreBench(
        folder=cache(partial(built_folder, models, dtype, options.quick)),
        device=device,
        dtype=dtype,
        rate=rate,
        repeats=options.repeats or MOST_REPEATS,
        batch_size=options.batch_size or (20 if on_gpu else 5),
        pairs=options.pairs,
        quick=options.quick,
        limit=float("inf") if options.repeats else (GPU_SECONDS if on_gpu else CPU_SECONDS),
    )
    machine = describe_machine(device, dtype, rate)
    head = f"{machine['device']}, {machine['dtype']}, {rate / 1e12:.3g} TFLOP/s in matrix products"
    deadline, rows = Deadline(options.budget), list[ScoreRow]()
    try:
        for name in (name for name in SCORE_CASES if name in options.cases):
            if deadline.left() < 0:
                bench.notes.append(f"{name}: not run, the time was up")
            else:
                print(f"{name} ...", file=sys.stderr, flush=True)
                rows += measure_scores(bench, SCORE_CASES[name])
            _write(options, machine, head, bench.notes, rows)  # what is known if the next one fails
    except (DiffencError, DisagreementError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 160)
    print_tables(COLUMNS, tables(rows), head, (*explanation(), *bench.notes), console)
    return 0


def _write(
    options: argparse.Namespace,
    machine: dict[str, Any],
    head: str,
    notes: Sequence[str],
    rows: Sequence[ScoreRow],
) -> None:
    if options.json:
        report = {"machine": machine, "notes": notes, "rows": [row.to_dict() for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.markdown:
        text = markdown_tables(COLUMNS, tables(rows), head, (*explanation(), *notes))
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
