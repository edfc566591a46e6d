"""What scores of images and texts cost, against the released way and against the bare floor.

    python benchmarks/scorer.py --json scorer.json

Stable Diffusion 2.1 and SDXL at real size with seeded random weights, which are built once (4 GB
and 7 GB on disk in half precision); nothing is downloaded. `--quick` takes narrow twins and small
pictures and ends in a minute: it shows that everything runs, and its times mean nothing.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from speed.measuring import Deadline
from speed.program import (
    Setting,
    bench_options,
    common_options,
    positive,
    start,
    write_report,
)
from speed.score_cases import SCORE_CASES
from speed.score_running import ScoreBench, measure_scores
from speed.score_tables import COLUMNS, ScoreRow, cells, explanation
from speed.tables import Tables, markdown_tables, print_tables, sections

MOST_REPEATS = 10
GPU_SECONDS, CPU_SECONDS = 30, 300
"""Of calls per case, after which there are no more repeats but the first three."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common_options(__doc__, SCORE_CASES, most_repeats=MOST_REPEATS)
    add = parser.add_argument
    add("--pairs", type=positive, default=4,
        help="pairs that the released way is timed on: its time is multiplied (4)")  # fmt: skip
    add("--batch-size", type=positive, help="rows per call of the U-Net: 5 on a CPU, else 20")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return start(parse(arguments), _run)


def _run(options: argparse.Namespace, setting: Setting) -> None:
    seconds = (GPU_SECONDS, CPU_SECONDS)
    bench = ScoreBench(
        **bench_options(options, setting, most_repeats=MOST_REPEATS, seconds=seconds),
        batch_size=options.batch_size or (20 if setting.on_gpu else 5),
        pairs=options.pairs,
    )
    deadline, rows = Deadline(options.budget), list[ScoreRow]()
    for name in (name for name in SCORE_CASES if name in options.cases):
        if deadline.left() < 0:
            bench.notes.append(f"{name}: not run, the time was up")
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows += measure_scores(bench, SCORE_CASES[name])
        # What is known if the next one fails.
        table = markdown_tables(COLUMNS, *_tables(bench, setting, rows))
        write_report(options, setting, bench.notes, rows, table)
    console = Console(width=None if sys.stdout.isatty() else 160)
    print_tables(COLUMNS, *_tables(bench, setting, rows), console)


def _tables(
    bench: ScoreBench, setting: Setting, rows: Sequence[ScoreRow]
) -> tuple[Tables, str, Sequence[str]]:
    """Tables, the line above them and those below."""
    return sections(rows, cells), setting.head, (*explanation(), *bench.notes)


if __name__ == "__main__":
    sys.exit(main())
