"""What a process costs up to its first features, against the imports that it cannot do without.

    python benchmarks/startup.py --json startup.json

Whole processes of both kinds take turns on one core: the bundled model's first features, and the
bare imports of torch, diffusers' U-Net and VAE, transformers' CLIP. What counts is the processor
time of user and system; the ratio is that of the medians. One process of each kind runs before,
so that files are in memory and compiled.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from speed.program import positive

GOAL = 1.1
"""Most processor time of the first features, in terms of the bare imports'."""

PROGRAMS = {
    "bare imports": (
        "import torch\n"
        "from diffusers import AutoencoderKL, UNet2DConditionModel\n"
        "from transformers import CLIPTextModel, CLIPTokenizer\n"
    ),
    "first features": (
        "from PIL import Image\n"
        "from diffenc import DiffusionEncoder\n"
        "encoder = DiffusionEncoder.from_pretrained('shapes')\n"
        "encoder(Image.new('RGB', (64, 64), 'red'), 'a red circle')\n"
    ),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--repeats", type=positive, default=7, help="timed processes of each kind (7)")
    add("--json", type=Path, help="file to write the seconds of every process to")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    for program in PROGRAMS.values():
        processor_seconds(program)
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(options.repeats):
        for name, program in PROGRAMS.items():
            seconds[name].append(processor_seconds(program))
    bare, first = (statistics.median(seconds[name]) for name in PROGRAMS)
    if options.json is not None:
        report = {"seconds": seconds, "ratio": first / bare, "goal": GOAL}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name, each in seconds.items():
        spread = f"{min(each):.2f} to {max(each):.2f}"
        print(f"{name:15} {statistics.median(each):6.2f} s of processor time ({spread})")
    print(f"{'ratio':15} {first / bare:6.3f} (goal: at most {GOAL})")
    return 0


def processor_seconds(program: str) -> float:
    """Time of user and system that a process takes from its start to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else sources are compiled in each process
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


if __name__ == "__main__":
    sys.exit(main())
