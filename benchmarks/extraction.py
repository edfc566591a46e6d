"""What the pipeline of `diffenc encode` adds to decoding and to the model, and its memory.

    python benchmarks/extraction.py speed --json speed.json
    python benchmarks/extraction.py memory --pictures 50000 --json memory.json

"speed" runs pairs in turns. First the pipeline with a model that does nothing, beside threads that
decode and resize the same pictures and throw them away: what is lost is the pipeline's own. Of
that, what the calling thread does before the first picture and after the last, when no other thread
decodes, is told in its processor time: so many seconds a run, however many pictures. Then
the pipeline with the bundled model, beside the bare encoder on batches that are decoded already.

"memory" writes features of 1,000, of 10,000 and of --pictures small pictures, each in a process of
its own, with a model that only takes means of colours. The last one is killed by SIGKILL half way
and run again to the end. It reports the largest resident memory of each process, and whether any
row is missing, doubled, or of another picture than its name says.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from speed.program import positive

from diffenc.extraction.extractor import Extractor
from diffenc.extraction.listing import list_pictures
from diffenc.extraction.reader import open_features
from diffenc.extraction.rows import Rows, Shapes
from diffenc.extraction.writing import write_features
from diffenc.shapes import render, sample_scenes

GOAL = 0.9
"""Least share of the bare speed."""

FLAT = 1.1
"""Most memory of a process, in terms of that of one that writes 1,000 pictures."""

FEW = (1_000, 10_000)
"""Numbers of pictures of the smaller runs."""

DRAWN = 300
"""Different pictures of the memory runs."""


class Idle(Extractor):
    """An extractor whose model does nothing: rows of the right shape, without values.

    Attributes:
        moments: Processor time of the thread that called `prepare`, as each picture was begun and
            was done, in seconds.
    """

    moments: list[float]

    def prepare(self) -> Callable[[Any], Any]:
        """The transform, with notes of the calling thread's processor time."""
        transform = super().prepare()
        caller = time.pthread_getcpuclockid(threading.get_ident())
        self.moments = []

        def noted(source: Any) -> Any:
            self.moments.append(time.clock_gettime(caller))
            values = transform(source)
            self.moments.append(time.clock_gettime(caller))
            return values

        return noted

    def read(self, pictures: Sequence[Any], prompts: Sequence[str] | None = None) -> Rows:
        """Rows of zeros."""
        shapes = self.row_shapes or {}
        count = len(pictures)
        return Rows({n: torch.zeros(count, *shape, dtype=d) for n, (shape, d) in shapes.items()})


class Means(Extractor):
    """An extractor without a model: the mean colour of each picture, in float32."""

    def read(self, pictures: Sequence[Any], prompts: Sequence[str] | None = None) -> Rows:
        """A row of three values for each picture."""
        (name,) = self.row_shapes or {}
        values = torch.stack([picture.flatten(-2).mean(-1).flatten() for picture in pictures])
        return Rows({name: values})

    @property
    def row_shapes(self) -> Shapes | None:
        """Three values under one name."""
        return {"colour": ((3,), torch.float32)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "memory", "write"))
    add = parser.add_argument
    add("--pictures", type=positive, default=1500, help="number of pictures")
    add("--repeats", type=positive, default=7, help="times that each of a pair runs (7)")
    add("--threads", type=positive, default=2, help="threads that decode (2)")
    add("--folder", type=Path, help="folder for pictures and features; default a temporary one")
    add("--json", type=Path, help="file to write all figures to")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.what == "write":
        return write(options.folder)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        report = {"speed": speed, "memory": memory}[options.what](folder, options)
    finally:
        shutil.rmtree(folder)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def link(folder: Path, count: int) -> Path:
    """Pictures of scenes, a thousand to a folder: links to a few hundred that are drawn."""
    drawn = folder.parent / "drawn"
    if not drawn.exists():
        drawn.mkdir(parents=True)
        for place, scene in enumerate(sample_scenes(DRAWN, seed=0)):
            render(scene, 96).save(drawn / f"{place}.jpg")
    for place in range(count):
        path = folder / f"{place // 1000:03d}" / f"{place:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(drawn / f"{place % DRAWN}.jpg", path)
    return folder


def draw(folder: Path, count: int, size: tuple[int, int], ending: str) -> Path:
    """Write pictures of scenes, a thousand to a folder; a few are drawn, and written many times."""
    scenes = sample_scenes(50, seed=0)
    drawn = []
    for scene in scenes:
        path = folder / f"one{ending}"
        render(scene, max(size)).resize((size[1], size[0]), Image.Resampling.BICUBIC).save(path)
        drawn.append(path.read_bytes())
        path.unlink()
    for place in range(count):
        path = folder / f"{place // 1000:03d}" / f"{place:06d}{ending}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(drawn[place % len(drawn)])
    return folder


def speed(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    for name, size, ending, pixels in (
        ("photographs, 480 x 640 to 512", (480, 640), ".jpg", 512),
        ("small pictures, 96 to 64", (96, 96), ".png", 64),
    ):
        pictures = folder / ending[1:]
        pictures.mkdir()
        count = options.pictures if pixels == 64 else options.pictures // 5
        draw(pictures, count, size, ending)
        idle = Idle("shapes", size=pixels, pool="mean", threads=options.threads, batch_size=16)
        paths = [str(path) for path in sorted(pictures.rglob(f"*{ending}"))]
        bare = in_turns(
            {
                "bare threads": partial(decode_alone, idle, paths),
                "pipeline": partial(write_features, pictures, folder / "out", idle, overwrite=True),
            },
            options.repeats,
        )
        figures = told(f"no model: {name}", bare, count)
        figures["alone"] = ends(
            idle, partial(write_features, pictures, folder / "out", idle, overwrite=True)
        )
        print(f"  before the first picture and after the last: {1000 * figures['alone']:.0f} ms")
        report[f"no model: {name}"] = figures
    model = Extractor("shapes", pool="mean", threads=options.threads, batch_size=16)
    count = options.pictures // 5
    some = list_pictures(sorted((folder / "png").rglob("*.png"))[:count])
    values = [model.encoder.transform(some.picture(place)) for place in range(count)]
    pairs = in_turns(
        {
            "bare encoder": lambda: encode_alone(model, values),
            "pipeline": lambda: write_features(some, folder / "out", model, overwrite=True),
        },
        options.repeats,
    )
    report["shapes"] = told("shapes, 64 px", pairs, count)
    return report


def in_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, which take turns; a first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ends(idle: Idle, call: Callable[[], object], repeats: int = 3) -> float:
    """Processor time of the calling thread while no picture is decoded, in seconds: the median."""
    seconds = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        seconds.append(min(idle.moments) - start + time.thread_time() - max(idle.moments))
    return statistics.median(seconds)


def told(title: str, seconds: dict[str, list[float]], count: int) -> dict[str, Any]:
    """Pictures a second of a pair, and the median of the ratios of neighbours."""
    (bare, alone), (pipeline, whole) = seconds.items()
    ratio = statistics.median(b / p for b, p in zip(alone, whole, strict=True))
    rates = {name: count / statistics.median(each) for name, each in seconds.items()}
    print(
        f"{title}: {bare} {rates[bare]:,.0f}/s, {pipeline} {rates[pipeline]:,.0f}/s, "
        f"ratio {ratio:.3f} (goal: at least {GOAL})",
        flush=True,
    )
    return {"seconds": seconds, "pictures": count, "ratio": ratio, "goal": GOAL}


def decode_alone(extractor: Extractor, paths: Sequence[str]) -> None:
    """Threads decode and resize, and throw away."""
    transform = extractor.encoder.transform

    def work(start: int) -> None:
        for path in paths[start :: extractor.thread_count]:
            transform(path)

    with ThreadPoolExecutor(extractor.thread_count) as pool:
        list(pool.map(work, range(extractor.thread_count)))


def encode_alone(extractor: Extractor, values: Sequence[torch.Tensor]) -> None:
    """The encoder alone on decoded pictures, pooled, and thrown away."""
    for start in range(0, len(values), extractor.batch_size):
        extractor.read(values[start : start + extractor.batch_size])


def memory(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {}
    counts = [*(few for few in FEW if few < options.pictures), options.pictures]
    for count in counts:
        place = folder / str(count)
        link(place / "pictures", count)
        killed: list[tuple[int, float]] = []
        start = time.perf_counter()
        if count == options.pictures:
            assert run(place, killed, kill_at=count // 2) == -signal.SIGKILL
            shards = len(list((place / "features").glob("shard-*.safetensors")))
            print(f"killed after {killed[-1][0]:,} pictures, {shards} shards are there", flush=True)
        lines: list[tuple[int, float]] = []
        assert run(place, lines) == 0
        seconds = time.perf_counter() - start
        check(place)
        most = max(size for _, size in (*killed, *lines))
        print(f"{count:,} pictures in {seconds:,.0f} s: at most {most:,.0f} MB", flush=True)
        report[str(count)] = {"killed": killed, "lines": lines, "seconds": seconds, "most": most}
    ratio = report[str(counts[-1])]["most"] / report[str(counts[0])]["most"]
    print(f"ratio {ratio:.3f} (goal: at most {FLAT})")
    return {**report, "ratio": ratio, "goal": FLAT}


def check(place: Path) -> None:
    """Hold every row against the picture of its name."""
    features = open_features(place / "features")
    pictures = place / "pictures"
    names = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.jpg"))
    assert list(features.ids) == names, "pictures are missing, doubled or in another order"
    transform = Means("shapes", size=64).encoder.transform
    some = [transform(pictures / name).flatten(-2).mean(-1).flatten() for name in names[:DRAWN]]
    expected = torch.stack(some).repeat(-(-len(names) // DRAWN), 1)[: len(names)]
    assert torch.equal(features.stack("colour"), expected), "a row is of another picture"


def run(place: Path, lines: list[tuple[int, float]], kill_at: int | None = None) -> int:
    """Run the writing process and note its largest memory so far; the exit code."""
    command = [sys.executable, __file__, "write", "--folder", str(place)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            done, size = line.split()
            lines.append((int(done), float(size)))
            if kill_at is not None and int(done) >= kill_at:
                process.kill()
    return process.returncode


def write(folder: Path) -> int:
    """Write features of all pictures, and print the largest memory every 500 and at the end."""
    extractor = Means("shapes", size=64, batch_size=64, threads=2)
    last = 0

    def report(done: int, _total: int) -> None:
        nonlocal last
        if done - last >= 500:
            last = done
            print(done, most_resident(), flush=True)

    write_features(folder / "pictures", folder / "features", extractor, progress=report)
    print(last, most_resident(), flush=True)
    return 0


def most_resident() -> float:
    """Largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
