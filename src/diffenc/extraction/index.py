"""The index of a folder of features: which row of which shard belongs to a picture."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffenc._optional import require
from diffenc.errors import ConfigError
from diffenc.extraction.shards import ShardTable
from diffenc.storage.names import is_file, printable, reason
from diffenc.storage.writing import writing

INDEX_FILE = "index.parquet"
"""The file that is written last: where it is, the folder is whole."""

_GROUP_ROWS = 100_000


def require_parquet() -> None:
    """Find out whether an index can be written and read.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    require("pyarrow.parquet", extra="parquet")


def write_index(folder: Path, tables: Iterable[ShardTable]) -> None:
    """Write the index of all shards, whole or not at all.

    The columns are "id", "shard" and "row"; "prompt", "truncated" and "words" where the run has
    them; and "reason", which is empty but for pictures that were left out. Those have no shard.

    Args:
        folder: Folder of the shards.
        tables: Tables of all shards, in order; one at a time is held in memory.

    Raises:
        OutputError: It cannot be written.
    """
    arrow = require("pyarrow", extra="parquet")
    parquet = require("pyarrow.parquet", extra="parquet")
    schema, waiting = _schema(arrow), []
    with (
        writing(folder / INDEX_FILE) as partial,
        parquet.ParquetWriter(partial, schema, compression="zstd") as writer,
    ):
        rows = 0
        for number, table in enumerate(tables):
            waiting.append(arrow.RecordBatch.from_pydict(_columns(table, number), schema=schema))
            rows += len(waiting[-1])
            if rows >= _GROUP_ROWS:
                writer.write_table(arrow.Table.from_batches(waiting, schema))
                waiting, rows = [], 0
        writer.write_table(arrow.Table.from_batches(waiting, schema))


def _schema(arrow: Any) -> Any:
    return arrow.schema(
        [
            ("id", arrow.string()),
            ("shard", arrow.int32()),
            ("row", arrow.int32()),
            ("prompt", arrow.string()),
            ("truncated", arrow.int32()),
            ("words", arrow.list_(arrow.string())),
            ("reason", arrow.string()),
        ]
    )


def _columns(table: ShardTable, number: int) -> dict[str, list[Any]]:
    kept, left_out = len(table.ids), len(table.skipped)
    none: list[Any] = [None] * left_out

    def padded(values: Any) -> list[Any]:
        return [*(values or [None] * kept), *none]

    return {
        "id": [*table.ids, *(name for name, _ in table.skipped)],
        "shard": [number] * kept + none,
        "row": [*range(kept), *none],
        "prompt": padded(table.prompts),
        "truncated": padded(table.truncated),
        "words": padded([list(words) for words in table.words]),
        "reason": [None] * kept + [why for _, why in table.skipped],
    }


def read_index(folder: Path) -> Any:
    """The index of a folder, as a table of pyarrow.

    Raises:
        ConfigError: The folder is not whole, or its index cannot be read.
        MissingExtraError: pyarrow is not installed.
    """
    parquet = require("pyarrow.parquet", extra="parquet")
    path = folder / INDEX_FILE
    if not is_file(path):
        raise ConfigError(f"{printable(folder)} holds no {INDEX_FILE}")
    try:
        return parquet.read_table(path)
    except Exception as error:  # pyarrow has errors of its own
        raise ConfigError(f"cannot read {printable(path)}: {reason(error)}") from error
