"""What an answer of the encoder costs, against plain diffusers and against the bare floor.

    python benchmarks/encoder.py --json encoder.json

Stable Diffusion 2.1 and SDXL at real size with seeded random weights, which are built once (4 GB
and 7 GB on disk in half precision); nothing is downloaded. `--quick` takes narrow twins and small
pictures and ends in a minute: it shows that everything runs, and its times mean nothing.
"""

import argparse
import json
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from real_size import build_folder
from rich.console import Console
from speed.cases import CASES, Case
from speed.measuring import fast_dtype, matrix_rate
from speed.running import Bench, Deadline, DisagreementError, measure
from speed.tables import Row, markdown, print_rows

from diffenc.backbones.device import check_placement
from diffenc.cli.options import quiet_libraries
from diffenc.errors import DiffencError

DTYPES = ("float32", "bfloat16", "float16")
MODELS = Path.home() / ".cache" / "diffenc" / "benchmarks"
COMPILE_SECONDS = 150
"""Left before the deadline for a case to be compiled; less is not enough for a real U-Net."""

MOST_REPEATS = 20
GPU_SECONDS, CPU_SECONDS = 20, 120
"""Of calls per case and batch, after which there are no more repeats but the first three."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE",
        help=f"any of {', '.join(CASES)}; all by default")  # fmt: skip
    add("--device", help="cpu or cuda; cuda by default where there is one")
    add("--dtype", choices=DTYPES, help="float16 on CUDA; on a CPU bfloat16 where it is fast")
    add("--batches", type=_sizes, metavar="N,N", help="pictures per call: 1 on a CPU, else 1,8,32")
    switch = argparse.BooleanOptionalAction
    add("--compile", action=switch, help="time diffenc compiled too, as by default on CUDA")
    add("--backend", default="inductor", help="of torch.compile")
    add("--repeats", type=positive, help="timed calls of each; 3 to 20 by the time they take")
    add("--threads", type=positive, help="of torch on a CPU")
    add("--models", type=Path, help=f"where models are built ({MODELS})")
    add("--quick", action="store_true", help="narrow models and small pictures, in a minute")
    add("--memory", action=switch, default=True, help="measure peaks")
    add("--budget", type=float, metavar="SECONDS", help="begin no case after this long")
    add("--json", type=Path, metavar="FILE", help="write the rows")
    add("--markdown", type=Path, metavar="FILE", help="write the table")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def _sizes(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


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
    console = Console(width=None if sys.stdout.isatty() else 160)
    on_gpu = device.type == "cuda"
    rate = matrix_rate(device, dtype)
    bench = Bench(
        folder=cache(partial(built_folder, models, dtype, options.quick)),
        device=device,
        dtype=dtype,
        rate=rate,
        repeats=options.repeats or MOST_REPEATS,
        quick=options.quick,
        memory=options.memory,
        limit=float("inf") if options.repeats else (GPU_SECONDS if on_gpu else CPU_SECONDS),
        options={"backend": options.backend},
    )
    compiled = on_gpu if options.compile is None else options.compile
    batches = options.batches or ([1, 8, 32] if on_gpu else [1])
    machine = describe_machine(device, dtype, rate)
    head = f"{machine['device']}, {machine['dtype']}, {rate / 1e12:.3g} TFLOP/s in matrix products"
    jobs, deadline, rows = _jobs(options.cases, batches, compiled), Deadline(options.budget), []
    try:
        for case, batch, kind in jobs:
            if _in_time(bench, case, batch, kind, deadline):
                found = measure(bench, case, batch=batch, compiled=kind)
                rows += found[1:] if kind else found  # eager diffenc has a row already
            rows.sort(key=lambda row: (list(CASES).index(row.case), row.batch))
            _write(options, machine, head, bench.notes, rows)  # what is known if the next one fails
    except (DiffencError, DisagreementError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_rows(rows, head, bench.notes, console)
    return 0


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


def _in_time(bench: Bench, case: Case, batch: int, compiled: bool, deadline: Deadline) -> bool:
    what = f"{case.name}, batch {batch}{', compiled' if compiled else ''}"
    if deadline.left() < (COMPILE_SECONDS if compiled and not bench.quick else 0):
        bench.notes.append(f"{what}: not run, the time was up")
        return False
    print(f"{what} ...", file=sys.stderr, flush=True)
    return True


def _write(
    options: argparse.Namespace,
    machine: dict[str, Any],
    head: str,
    notes: Sequence[str],
    rows: Sequence[Row],
) -> None:
    if options.json:
        report = {"machine": machine, "notes": notes, "rows": [row.to_dict() for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(rows, head, notes), encoding="utf-8")


def built_folder(models: Path, dtype: torch.dtype, quick: bool, alias: str) -> Path:
    kind = str(dtype).removeprefix("torch.") + ("-narrow" if quick else "")
    folder = models / kind / alias
    if not (folder / "model_index.json").exists():
        print(f"building {alias} in {folder} ...", file=sys.stderr, flush=True)
    return build_folder(alias, folder, dtype=dtype, narrow=quick)


def describe_machine(device: torch.device, dtype: torch.dtype, rate: float) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "matrix_rate": rate,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    """Its name and the number of threads, as the system tells them."""
    told = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", told.read_text()) if told.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main())
