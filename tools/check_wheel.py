"""Check a built wheel: all of the package is inside, nothing else is, and it works from elsewhere.

python tools/check_wheel.py dist/diffenc-0.1.0-py3-none-any.whl
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
ASSETS = "diffenc/models/assets/"
ASSETS_LIMIT = 40_000_000  # bytes
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}

RUN_DEMO = """
import sys
import diffenc
from diffenc.cli.main import main

assert diffenc.__file__.startswith(sys.argv.pop()), f"imported {diffenc.__file__} instead"
sys.exit(main())
"""


def main() -> int:
    """Print what was found; return 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        problems = list(wrong_content(sizes))
        if not problems:
            archive.extractall(folder)
            problems = list(wrong_behaviour(Path(folder).resolve()))
    for problem in problems:
        print(f"{wheel.name}: {problem}", file=sys.stderr)
    if not problems:
        megabytes = assets_size(sizes) / 1e6
        print(f"{wheel.name}: {len(sizes)} files, {megabytes:.1f} MB of assets, demo runs offline")
    return 1 if problems else 0


def wrong_content(sizes: dict[str, int]) -> Iterator[str]:
    """Compare the names and sizes in the wheel with the source tree and the rules."""
    inside = set(sizes)
    if missing := source_files() - inside:
        yield f"lacks {sorted(missing)}"
    if "diffenc/py.typed" not in inside:
        yield "lacks diffenc/py.typed: users get no types"
    for suffix in (".safetensors", ".json"):
        if not any(name.startswith(ASSETS) and name.endswith(suffix) for name in inside):
            yield f"has no {suffix} file under {ASSETS}: the bundled model is incomplete"
    for required in ("/licenses/LICENSE", "/entry_points.txt"):
        if not any(".dist-info/" in name and name.endswith(required) for name in inside):
            yield f"lacks *.dist-info{required}"
    if strangers := {name.partition("/")[0] for name in inside if not belongs(name)}:
        yield f"installs more than diffenc: {sorted(strangers)}"
    if unwanted := {name for name in inside if Path(name).suffix in {".pyc", *PICKLES}}:
        yield f"carries bytecode or pickles: {sorted(unwanted)}"
    if assets_size(sizes) > ASSETS_LIMIT:
        yield f"has {assets_size(sizes) / 1e6:.1f} MB of assets, over {ASSETS_LIMIT / 1e6:.0f} MB"


def wrong_behaviour(site: Path) -> Iterator[str]:
    """Run the demo from the unpacked wheel, in another folder and without network."""
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-c", RUN_DEMO, "demo", "-o", "demo.png", str(site)]
        environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            yield f"diffenc demo fails:\n{done.stdout}{done.stderr}"
        elif not Path(elsewhere, "demo.png").is_file():
            yield "diffenc demo writes no figure"


def source_files() -> set[str]:
    """Names, as a wheel has them, of all files of the package."""
    return {
        path.relative_to(SOURCE).as_posix()
        for path in (SOURCE / "diffenc").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def assets_size(sizes: dict[str, int]) -> int:
    """Bytes that the bundled models take, unpacked."""
    return sum(size for name, size in sizes.items() if name.startswith(ASSETS))


def belongs(name: str) -> bool:
    """Whether a file belongs to the package or to its metadata."""
    top = name.partition("/")[0]
    return top == "diffenc" or (top.startswith("diffenc-") and top.endswith(".dist-info"))


if __name__ == "__main__":
    sys.exit(main())
