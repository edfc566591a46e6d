"""Winoground from the layouts in which it is passed on.

Source:
    Thrush et al. 2022 (Winoground), arXiv:2204.03162.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from diffenc.errors import ConfigError
from diffenc.evals.files import DatasetFiles, resolve_data
from diffenc.evals.items import Picture, Problem, picture_of
from diffenc.evals.matching.base import Item, MatchingBenchmark
from diffenc.evals.rows import Column, Row, TableRows, read_csv, read_jsonl, read_parquet, rows_of
from diffenc.storage.reading import decode, parse_json
from diffenc.storage.schema import checked

REPOSITORIES = ("facebook/winoground",)
ITEMS = 400

_PICTURES = ("image_0", "image_1")
_COLUMNS = (
    Column("id", also=("index", "example_id")),
    Column("image_0", also=("image0", "img_0"), kind="any"),
    Column("image_1", also=("image1", "img_1"), kind="any"),
    Column("caption_0", also=("caption0", "text_0"), kind="text"),
    Column("caption_1", also=("caption1", "text_1"), kind="text"),
    Column("collapsed_tag", needed=False),
    Column("num_main_preds", needed=False),
    Column("tag", needed=False),
    Column("secondary_tag", needed=False),
)
_LABELS = ("collapsed_tag", "num_main_preds", "tag", "secondary_tag")
_TABLES = ("metadata.csv", "examples.jsonl", "metadata.jsonl", "examples.csv")
_HARD = "why_winoground_hard.json"

_Find = Callable[[Any, str], Picture | None]


def load_winoground(data: "str | os.PathLike[str]") -> MatchingBenchmark:
    """Read Winoground; nothing is downloaded.

    These layouts are read, in a folder, in folders in it, or in a .zip file: the Hub's parquet
    files; `examples.jsonl` or `metadata.jsonl` with pictures named by stem; `metadata.csv` with
    relative paths, with `examples.jsonl` beside it for the tags it lacks. Pictures may lie in an
    `images.zip`. Extra tags are taken from `why_winoground_hard.json`.

    Args:
        data: Path of a folder or a .zip file, or "facebook/winoground" if the dataset is in the
            Hub's cache.

    Returns:
        The items; what is wrong with files is in `problems`, and refused by `evaluate`.

    Raises:
        ConfigError: There is no such dataset, or a column is missing.
        MissingExtraError: Parquet files without pyarrow.
    """
    terms = "accept the terms on the dataset's page, log in with 'hf auth login', "
    files = resolve_data(data, REPOSITORIES, terms=terms)
    tables = [_read_table(files, name) for name in _table_names(files)]
    main = tables[0]
    more = {row.text("id"): row.values for table in tables[1:] for row in table.rows}
    hard, problems = _hard_tags(files)
    faults = [*(problem for table in tables for problem in table.problems), *problems]
    rows = [
        Row(
            row.where,
            {**more.get(row.text("id"), {}), **row.values, "hard": hard.get(row.text("id"))},
        )
        for row in main.rows
    ]

    def find(value: Any, where: str) -> Picture | None:
        name = files.picture(value) if isinstance(value, str) else None
        return picture_of(value, where) if name is None else Picture(name, files.reader(name))

    return _benchmark(rows, find, str(files.source), tuple(faults), main.notes, expected=ITEMS)


def winoground_from_rows(rows: Sequence[Mapping[str, Any]]) -> MatchingBenchmark:
    """Winoground from rows in memory, such as split "test" of `datasets.load_dataset`.

    Args:
        rows: Rows with the Hub's columns; a picture is a PIL image, bytes, or
            `{"bytes": ..., "path": ...}`.

    Raises:
        ConfigError: A column is missing.
    """
    table = rows_of(rows, _COLUMNS, "rows")
    return _benchmark(table.rows, picture_of, "rows", table.problems, table.notes, expected=ITEMS)


def _table_names(files: DatasetFiles) -> list[list[str]]:
    """The tables to read, each as one file or as parts; those behind the first add columns."""
    parquet = files.named("*.parquet")
    parts = [name for name in parquet if "test" in PurePosixPath(name).name.lower()] or parquet
    named = [files.named(name) for name in _TABLES]
    plain = [[min(names, key=lambda name: (name.count("/"), name))] for names in named if names]
    if parts and not (plain and files.has_pictures):  # parquet holds its pictures itself
        return [parts]
    if not plain:
        raise ConfigError(
            f"{files.source} is no Winoground: it holds none of {', '.join(_TABLES)} and no "
            f".parquet file, but {files.names[:5] or 'nothing'}"
        )
    return plain


def _read_table(files: DatasetFiles, names: list[str]) -> TableRows:
    if names[0].endswith(".parquet"):
        paths = [files.path(name) for name in names]
        if None in paths:
            raise ConfigError(f"{names[0]} lies inside an archive; unpack it first")
        return read_parquet(paths, _COLUMNS, _PICTURES, names[0])
    read = read_csv if names[0].lower().endswith(".csv") else read_jsonl
    return read(files.reader(names[0])(), _COLUMNS, names[0])


def _hard_tags(files: DatasetFiles) -> tuple[dict[str, list[str]], tuple[Problem, ...]]:
    names = files.named(_HARD)
    if not names:
        return {}, ()
    try:
        text = decode(files.reader(names[0])(), where=names[0])
        content = parse_json(text, where=names[0])
        tags = checked(content, dict[str, str | list[str]], names[0])
    except ConfigError as error:
        return {}, (Problem("broken rows", names[0], str(error)),)
    return {key: [tag] if isinstance(tag, str) else tag for key, tag in tags.items()}, ()


def _benchmark(
    rows: Sequence[Row],
    find: _Find,
    source: str,
    problems: Sequence[Problem],
    notes: Sequence[str],
    *,
    expected: int,
) -> MatchingBenchmark:
    items: dict[str, Item] = {}
    faults = list(problems)
    for row in rows:
        faults += _row_problems(row, items)
        item = _item(row, find, faults)
        if item is not None and item.id not in items:
            items[item.id] = item
    return MatchingBenchmark(
        name="winoground",
        source=source,
        items=tuple(items.values()),
        label_kind="collapsed_tag",
        expected=expected,
        problems=tuple(faults),
        notes=tuple(notes),
    )


def _row_problems(row: Row, known: Mapping[str, Item]) -> Iterator[Problem]:
    if not row.text("id"):
        yield Problem("rows without an id", row.where)
    elif row.text("id") in known:
        yield Problem("ids that occur twice", f"id {row.text('id')}", row.where)
    for column in ("caption_0", "caption_1"):
        if not row.text(column):
            yield Problem("missing captions", f"id {row.text('id')}", column)


def _item(row: Row, find: _Find, faults: list[Problem]) -> Item | None:
    pictures = []
    for column in _PICTURES:
        value = row.values.get(column)
        where = f"id {row.text('id')}"
        empty = value is None or (isinstance(value, str) and not value)
        picture = None if empty else find(value, f"{column} of {where}")
        if picture is None:
            detail = "no value" if empty else value if isinstance(value, str) else column
            faults.append(Problem("missing pictures", where, str(detail)))
        pictures.append(picture)
    first, second = pictures
    captions = (row.text("caption_0"), row.text("caption_1"))
    if first is None or second is None or not all(captions) or not row.text("id"):
        return None
    return Item(row.text("id"), (first, second), captions, _labels(row))


def _labels(row: Row) -> dict[str, tuple[str, ...]]:
    labels: dict[str, tuple[str, ...]] = {
        kind: (row.text(kind),) for kind in _LABELS if row.text(kind)
    }
    if hard := row.values.get("hard"):
        labels["hard"] = tuple(hard)
    return labels
