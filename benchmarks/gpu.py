"""Everything that needs a GPU, in ten minutes and without a network: tests, then benchmarks.

    make gpu

Writes one JSON and one Markdown file. Where there is no GPU it says so and leaves with status 0.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "diffusers", "transformers", "peft", "einops", "jaxtyping", "rich", "typer")
TEST_SECONDS = 240
SPARE_SECONDS = 30
"""For what the benchmarks are doing when their time is up."""

ENCODER_SHARE = 0.6
"""Of the time that the tests leave; the rest is for the programs below, equally."""

PROGRAMS: dict[str, tuple[str, ...]] = {
    "savings.py": ("--time", "sd2.1-base", "sdxl", "--repeats", "5"),
    "extraction.py": ("speed", "--pictures", "500", "--repeats", "3"),
}
"""What is run after `encoder.py`, with its options: what texts have in common, and the pipeline of
`diffenc encode`."""


@dataclass(slots=True)
class TestReport:
    """What became of the tests marked `gpu`.

    Attributes:
        status: "passed", "failed", or why they did not run.
        passed: Number.
        skipped: Number.
        failed: Names.
        seconds: They took together.
    """

    status: str
    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT, help="folder of the two files")
    parser.add_argument("--minutes", type=float, default=10, help="for everything (%(default)s)")
    parser.add_argument("benchmark", nargs="*", help="options of benchmarks/encoder.py, after --")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        print(f"error: {sys.executable} lacks {', '.join(missing)}; install diffenc into it, or "
              "name another one: make gpu PYTHON=/path/to/python", file=sys.stderr)  # fmt: skip
        return 1
    import torch

    if not torch.cuda.is_available():
        print("No CUDA device here, so there is nothing to run: `make gpu` is for a machine with "
              "a GPU. `make test` and `python benchmarks/encoder.py` run without one.")  # fmt: skip
        return 0
    tests = run_tests()
    end = start + 60 * options.minutes
    others: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        left = ENCODER_SHARE * (end - time.monotonic())
        benchmark, status = run_benchmark(Path(scratch), left, options.benchmark)
        for place, (program, more) in enumerate(PROGRAMS.items()):
            seconds = (end - time.monotonic()) / (len(PROGRAMS) - place)
            others[program], failed = run_program(Path(scratch), program, more, seconds)
            status = status or failed
    write_report(options.out, tests, benchmark, others)
    return 0 if tests.status == "passed" and status == 0 else 1


def run_tests() -> TestReport:
    """Those marked `gpu`; their output goes to the terminal."""
    if importlib.util.find_spec("pytest") is None:
        return TestReport("not run: pytest is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={results}"]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=TEST_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return TestReport(f"not finished in {TEST_SECONDS} s")
        if not results.exists():
            return TestReport(f"not run: pytest left with status {done.returncode}")
        return read_results(results)


def read_results(file: Path) -> TestReport:
    """Of pytest's JUnit file."""
    report = TestReport("passed")
    for case in ElementTree.parse(file).iter("testcase"):
        kinds = {child.tag for child in case}
        report.seconds += float(case.get("time", 0))
        if kinds & {"failure", "error"}:
            report.failed.append(f"{case.get('classname')}.{case.get('name')}")
        elif "skipped" in kinds:
            report.skipped += 1
        else:
            report.passed += 1
    if report.failed:
        report.status = "failed"
    elif not report.passed:
        report.status = "failed: no test ran"
    return report


def run_benchmark(
    scratch: Path, seconds: float, options: Sequence[str]
) -> tuple[dict[str, Any], int]:
    """What `benchmarks/encoder.py` wrote, also where it ended early, and its exit status."""
    rows, table = scratch / "encoder.json", scratch / "encoder.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "encoder.py"), "--json", str(rows)]
    command += ["--markdown", str(table), "--budget", str(max(0, seconds - SPARE_SECONDS))]
    try:
        done = subprocess.run([*command, *options], timeout=max(1, seconds), check=False)
        status = done.returncode
        ended = f"left with status {status}" if status else ""
    except subprocess.TimeoutExpired:  # the rows so far are there
        status, ended = 0, "stopped when the time was up"
    found: dict[str, Any] = {"rows": [], "notes": [], "table": ""}
    if rows.exists():
        found = {**json.loads(rows.read_text()), "table": table.read_text()}
    if ended:
        found["notes"].append(f"benchmarks/encoder.py {ended}")
        found["table"] += f"\n* benchmarks/encoder.py {ended}\n"
    return found, status


def run_program(
    scratch: Path, program: str, options: Sequence[str], seconds: float
) -> tuple[dict[str, Any], int]:
    """What another program printed and wrote as JSON, and its exit status.

    Args:
        scratch: Folder for its file.
        program: Name of its file in `benchmarks`.
        options: Options, without that of the file.
        seconds: Time after which it is stopped, which is no failure.
    """
    file = scratch / f"{program}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / program), *options, "--json", str(file)]
    printed, status, note = "", 0, ""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, timeout=max(1, seconds), check=False, text=True
        )
        printed, status = done.stdout, done.returncode
        note = f"left with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        note = "stopped when the time was up"
    notes = [f"benchmarks/{program} {note}"] if note else []
    rows = json.loads(file.read_text()) if file.exists() else None
    return {"rows": rows, "notes": notes, "printed": printed}, status


def write_report(
    folder: Path,
    tests: TestReport,
    benchmark: dict[str, Any],
    others: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """`gpu-report.json` and `gpu-report.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    others = others or {}
    told = {key: value for key, value in benchmark.items() if key != "table"}
    report = {"tests": asdict(tests), "benchmark": told}
    for program, each in others.items():
        report[program] = {key: value for key, value in each.items() if key != "printed"}
    text = json.dumps(report, indent=2)
    (folder / "gpu-report.json").write_text(text + "\n", encoding="utf-8")
    lines = [
        "# Tests on a GPU",
        "",
        f"{tests.status}: {tests.passed} passed, {len(tests.failed)} failed, {tests.skipped} "
        f"skipped, in {tests.seconds:.0f} s",
        *(f"* failed: `{name}`" for name in tests.failed),
        "",
        benchmark["table"],
        *(f"* {note}" for each in others.values() for note in each["notes"]),
        *(each["printed"].strip() for each in others.values()),
    ]
    (folder / "gpu-report.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"wrote {folder / 'gpu-report.json'} and {folder / 'gpu-report.md'}")


if __name__ == "__main__":
    sys.exit(main())
