"""Which files features are best kept in: how fast they are written, and read row by row.

    python benchmarks/extraction_formats.py --json formats.json

Rows of one pooled vector and rows of one whole tap of SDXL are written and read in random order as
safetensors shards with a parquet index (what diffenc writes), parquet alone, Lance and zarr. Those
that are not installed are left out: pip install pyarrow pylance zarr. Each format's files are
flushed to disk within the time of writing; "cold" reads follow after the system was told to forget
the files, "warm" ones repeat them.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from speed.program import positive

from diffenc.extraction.index import write_index
from diffenc.extraction.reader import FeatureFolder
from diffenc.extraction.rows import Rows
from diffenc.extraction.shards import Shard, read_table, shard_name
from diffenc.storage.writing import write_json

SHARD_BYTES = 2**28
CASES = {
    "pooled vector, 1280 float32": ((1280,), np.float32, 20_000),
    "tap of SDXL, 1280 x 16 x 16 float16": ((1280, 16, 16), np.float16, 800),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--repeats", type=positive, default=3, help="times that each format is measured (3)")
    add("--reads", type=positive, default=400, help="rows that are read in random order (400)")
    add("--scale", type=float, default=1.0, help="factor on the number of rows (1)")
    add("--folder", type=Path, help="folder to write to; default a temporary one")
    add("--json", type=Path, help="file to write all figures to")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    report: dict[str, Any] = {}
    for case, (shape, dtype, count) in CASES.items():
        rows = max(10, int(count * options.scale))
        values = np.random.default_rng(0).standard_normal((rows, *shape), np.float32).astype(dtype)
        print(f"{case}: {rows:,} rows, {values.nbytes / 1e6:,.0f} MB")
        report[case] = {}
        for name, (package, write, open_) in FORMATS.items():
            if find_spec(package) is None:
                print(f"  {name:32} not installed")
                continue
            figures = measure(values, write, open_, options)
            report[case][name] = figures
            print("  " + f"{name:32}" + ", ".join(f"{k} {v:,.1f}" for k, v in figures.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(
    values: np.ndarray,
    write: Callable[[Path, np.ndarray], None],
    open_: Callable[[Path], Callable[[int], np.ndarray]],
    options: argparse.Namespace,
) -> dict[str, float]:
    places = np.random.default_rng(1).permutation(len(values))[: options.reads].tolist()
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as first:  # imports, and first calls
        write(Path(first), values[:8])
        open_(Path(first))(0)
    for _ in range(options.repeats):
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            start = time.perf_counter()
            write(folder, values)
            flush(folder)
            seconds = time.perf_counter() - start
            figures.setdefault("write MB/s", []).append(values.nbytes / 1e6 / seconds)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            figures.setdefault("size %", []).append(100 * size / values.nbytes)
            forget(folder)
            for state in ("cold", "warm"):
                start = time.perf_counter()
                read = open_(folder)
                for place in places:
                    row = read(place)
                    assert row.shape == values.shape[1:]
                each = 1e3 * (time.perf_counter() - start) / len(places)
                figures.setdefault(f"{state} ms/row", []).append(each)
            np.testing.assert_array_equal(row, values[places[-1]])
        finally:
            shutil.rmtree(folder)
    return {name: statistics.median(each) for name, each in figures.items()}


def flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def forget(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def rows_together(values: np.ndarray) -> int:
    return max(1, min(1000, SHARD_BYTES // int(values[0].nbytes)))


def write_shards(folder: Path, values: np.ndarray) -> None:
    import torch

    step = rows_together(values)
    for number, first in enumerate(range(0, len(values), step)):
        part = values[first : first + step]
        shard = Shard(len(part), "run")
        ids = [f"{first + row}.jpg" for row in range(len(part))]
        shard.add(Rows({"tap": torch.from_numpy(part)}), ids)
        shard.write(folder / shard_name(number))
    paths = sorted(folder.glob("shard-*"))
    tables = (read_table(path, "run") for path in paths)
    write_index(folder, (table for table in tables if table is not None))
    write_json(folder / "features.json", {"model": "none"})


def open_shards(folder: Path) -> Callable[[int], np.ndarray]:
    features = FeatureFolder(folder)

    def read(place: int) -> np.ndarray:
        row: np.ndarray = features[f"{place}.jpg"]["tap"].numpy()
        return row

    return read


def arrow_table(values: np.ndarray, first: int) -> Any:
    import pyarrow as pa

    flat = pa.array(values.reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, values[0].size)
    ids = pa.array([f"{first + row}.jpg" for row in range(len(values))])
    return pa.table({"id": ids, "tap": column})


def write_parquet(folder: Path, values: np.ndarray) -> None:
    import pyarrow.parquet as pq

    step = rows_together(values)
    for number, first in enumerate(range(0, len(values), step)):
        table = arrow_table(values[first : first + step], first)
        # Few rows a group: a row cannot be read without its group.
        group = max(1, 2**20 // values[0].nbytes)
        pq.write_table(
            table,
            folder / f"{number:06d}.parquet",
            row_group_size=group,
            compression="none",
            use_dictionary=False,
        )


def open_parquet(folder: Path) -> Callable[[int], np.ndarray]:
    import pyarrow.parquet as pq

    files = [pq.ParquetFile(path) for path in sorted(folder.glob("*.parquet"))]
    step, group = files[0].metadata.num_rows, files[0].metadata.row_group(0).num_rows
    shapes = {1280: (1280,), 1280 * 256: (1280, 16, 16)}

    def read(place: int) -> np.ndarray:
        number, row = divmod(place, step)
        column = files[number].read_row_group(row // group, columns=["tap"])["tap"]
        flat = column.combine_chunks()[row % group].values.to_numpy(zero_copy_only=False)
        return np.asarray(flat).reshape(shapes[len(flat)])

    return read


def write_lance(folder: Path, values: np.ndarray) -> None:
    import lance

    step = rows_together(values)
    for first in range(0, len(values), step):
        table = arrow_table(values[first : first + step], first)
        lance.write_dataset(table, str(folder / "rows.lance"), mode="append" if first else "create")


def open_lance(folder: Path) -> Callable[[int], np.ndarray]:
    import lance

    rows = lance.dataset(str(folder / "rows.lance"))
    shapes = {1280: (1280,), 1280 * 256: (1280, 16, 16)}

    def read(place: int) -> np.ndarray:
        column = rows.take([place], columns=["tap"])["tap"]
        flat = column.combine_chunks()[0].values.to_numpy(zero_copy_only=False)
        return np.asarray(flat).reshape(shapes[len(flat)])

    return read


def write_zarr(folder: Path, values: np.ndarray) -> None:
    import zarr

    step = rows_together(values)
    chunk = max(1, 2**16 // values[0].nbytes)
    array = zarr.create_array(
        str(folder / "tap.zarr"),
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, *values.shape[1:]),
        shards=(step // chunk * chunk, *values.shape[1:]),
        compressors=None,
    )
    for first in range(0, len(values), array.shards[0]):
        array[first : first + array.shards[0]] = values[first : first + array.shards[0]]


def open_zarr(folder: Path) -> Callable[[int], np.ndarray]:
    import zarr

    array = zarr.open_array(str(folder / "tap.zarr"), mode="r")
    return lambda place: np.asarray(array[place])


Format = tuple[
    str, Callable[[Path, np.ndarray], None], Callable[[Path], Callable[[int], np.ndarray]]
]
FORMATS: dict[str, Format] = {
    "safetensors + parquet index": ("pyarrow", write_shards, open_shards),
    "parquet": ("pyarrow", write_parquet, open_parquet),
    "Lance": ("lance", write_lance, open_lance),
    "zarr, sharded": ("zarr", write_zarr, open_zarr),
}

if __name__ == "__main__":
    sys.exit(main())
