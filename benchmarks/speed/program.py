"""What the programs share: options, the machine, the models that are built, the files written."""

import argparse
import json
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from real_size import build_folder

from diffenc.cli.options import quiet_libraries
from diffenc.errors import DiffencError
from diffenc.models.device import check_placement
from speed.bench import DisagreementError
from speed.measuring import CLOCKS, fast_dtype, matrix_rate
from speed.tables import MeasuredRow

DTYPES = ("float32", "bfloat16", "float16")
MODELS = Path.home() / ".cache" / "diffenc" / "benchmarks"


def common_options(
    description: str | None, cases: Collection[str], *, most_repeats: int
) -> argparse.ArgumentParser:
    """A parser with the options that every program has."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    add = parser.add_argument
    add("--cases", nargs="+", choices=list(cases), default=list(cases), metavar="CASE",
        help=f"any of {', '.join(cases)}; all by default")  # fmt: skip
    add("--device", help="cpu or cuda; cuda by default where there is one")
    add("--dtype", choices=DTYPES, help="float16 on CUDA; on a CPU bfloat16 where it is fast")
    add("--repeats", type=positive,
        help=f"timed calls of each; 3 to {most_repeats} by the time they take")  # fmt: skip
    add("--threads", type=positive, help="of torch on a CPU")
    add("--clock", choices=list(CLOCKS), default="wall",
        help="cpu leaves out what other programs take, and holds with one thread")  # fmt: skip
    add("--models", type=Path, help=f"where models are built ({MODELS})")
    add("--quick", action="store_true", help="narrow models and small pictures, in a minute")
    add("--budget", type=float, metavar="SECONDS", help="begin no case after this long")
    add("--json", type=Path, metavar="FILE", help="write the rows")
    add("--markdown", type=Path, metavar="FILE", help="write the table")
    return parser


def positive(text: str) -> int:
    """A number of something, as an option's type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a program runs on.

    Attributes:
        folder: Gives a model's folder, and builds it where it is missing.
        device: Where contenders run.
        dtype: Of the weights.
        rate: Floating point operations a second of a large matrix product.
        machine: What the numbers depend on beside the code, as JSON holds it.
    """

    folder: Callable[[str], Path]
    device: torch.device
    dtype: torch.dtype
    rate: float
    machine: Mapping[str, Any]

    @property
    def on_gpu(self) -> bool:
        """Whether it is CUDA."""
        return self.device.type == "cuda"

    @property
    def head(self) -> str:
        """The machine in a line, above the tables."""
        rate = f"{self.rate / 1e12:.3g} TFLOP/s in matrix products"
        return f"{self.machine['device']}, {self.machine['dtype']}, {rate}"


def bench_options(
    options: argparse.Namespace, setting: Setting, *, most_repeats: int, seconds: tuple[int, int]
) -> dict[str, Any]:
    """What a `Bench` is made with.

    Args:
        options: Of the command line.
        setting: What the program runs on.
        most_repeats: Where the command line does not say.
        seconds: Of calls per case on a GPU and on a CPU, after which there are no more repeats;
            without limit where the command line gives their number.
    """
    limit = seconds[0] if setting.on_gpu else seconds[1]
    return {
        "folder": setting.folder,
        "device": setting.device,
        "dtype": setting.dtype,
        "rate": setting.rate,
        "repeats": options.repeats or most_repeats,
        "quick": options.quick,
        "limit": float("inf") if options.repeats else limit,
        "timer": CLOCKS[options.clock],
    }


def start(options: argparse.Namespace, run: Callable[[argparse.Namespace, Setting], None]) -> int:
    """Run a program on the device and in the dtype that were asked for; its exit status."""
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
        rate = matrix_rate(device, dtype)
        setting = Setting(
            folder=cache(partial(built_folder, models, dtype, options.quick)),
            device=device,
            dtype=dtype,
            rate=rate,
            machine=describe_machine(device, dtype, rate),
        )
        try:
            run(options, setting)
        except (DiffencError, DisagreementError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def write_report(
    options: argparse.Namespace,
    setting: Setting,
    notes: Sequence[str],
    rows: Sequence[MeasuredRow],
    markdown: str,
) -> None:
    """The files that were asked for: rows as JSON, tables as Markdown."""
    if options.json:
        report = {
            "machine": setting.machine,
            "notes": notes,
            "rows": [row.to_dict() for row in rows],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown, encoding="utf-8")


def built_folder(models: Path, dtype: torch.dtype, quick: bool, alias: str) -> Path:
    """The folder of a model with random weights, built where it is missing."""
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
