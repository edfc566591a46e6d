"""Lists of pictures in files: paths, and a text and a name for each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffenc._optional import require
from diffenc.errors import ConfigError, PromptError, near_matches
from diffenc.storage.lines import parse_csv, parse_json_lines
from diffenc.storage.names import is_file, printable, reason
from diffenc.storage.reading import read_text, text_lines

LIST_ENDINGS = (".csv", ".jsonl", ".parquet", ".txt")

_LIST_BYTES = 2**32


@dataclass(frozen=True, slots=True)
class ListRows:
    """Rows of a list.

    Attributes:
        paths: Path of each picture, as the list has it.
        prompts: Text of each picture; None where none are asked for.
        ids: Name of each row; None where none are asked for.
    """

    paths: Sequence[str]
    prompts: Sequence[str] | None
    ids: Sequence[str] | None


def read_list(path: Path, *, image: str, prompt: str | None, id_: str | None) -> ListRows:
    """Read a list of pictures.

    Args:
        path: A .csv file with a header, a .jsonl file with an object per line, a .parquet file, or
            a .txt file with a path per line.
        image: Name of the column with the paths.
        prompt: Name of the column with the texts; None reads none.
        id_: Name of the column with names of the rows; None reads none.

    Raises:
        ConfigError: It cannot be read, has no such column, or an entry is no path or no name.
        PromptError: An entry is no text.
        MissingExtraError: It is a .parquet file and pyarrow is not installed.
    """
    if not is_file(path):
        raise ConfigError(f"there is no such list: {printable(path)}")
    ending, shown = path.suffix.lower(), printable(path)
    if ending == ".txt":
        if prompt is not None or id_ is not None or image != "image":
            raise ConfigError(
                f"{shown} is a list of paths without columns; give a .csv, .jsonl or .parquet file"
            )
        lines = text_lines(read_text(path, most=_LIST_BYTES))
        columns: dict[str, list[Any]] = {image: [line for line in lines if line.strip()]}
        wheres: Sequence[int] = [n for n, line in enumerate(lines, 1) if line.strip()]
    else:
        names = [name for name in (image, prompt, id_) if name is not None]
        reader = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[ending]
        columns, wheres = reader(path, list(dict.fromkeys(names)))
    if not columns[image]:
        raise ConfigError(f"{shown} lists no pictures")
    paths = _texts(columns[image], wheres, f"{shown}, line", f"the path in {image!r}", ConfigError)
    return ListRows(
        paths,
        None
        if prompt is None
        else _texts(columns[prompt], wheres, f"{shown}, line", f"{prompt!r}", PromptError, True),
        None if id_ is None else _ids(columns[id_], wheres, shown, id_),
    )


def _texts(
    values: Iterable[Any],
    wheres: Sequence[int],
    where: str,
    what: str,
    error: type[Exception],
    empty: bool = False,
) -> list[str]:
    texts = []
    for value, number in zip(values, wheres, strict=True):
        if not isinstance(value, str) or not (value or empty) or "\0" in value:
            hint = '; "" stands for the empty text' if empty else ""
            hint = _picture_hint(value) or hint
            raise error(f"{where} {number}: {what} is no text: {printable(repr(value), 60)}{hint}")
        texts.append(value)
    return texts


def _picture_hint(value: Any) -> str:
    if isinstance(value, (bytes, Mapping)):
        return (
            "; this column holds pictures, not paths: pass such a table to an Extractor, by "
            "datasets.map or Ray Data"
        )
    return ""


def _ids(values: Iterable[Any], wheres: Sequence[int], shown: str, name: str) -> list[str]:
    ids = []
    for value, number in zip(values, wheres, strict=True):
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise ConfigError(
                f"{shown}, line {number}: the name in {name!r} is neither a text nor a whole "
                f"number: {printable(repr(value), 60)}"
            )
        ids.append(str(value))
    return ids


def _require_columns(names: Sequence[str], header: Sequence[str], path: Path) -> None:
    for name in names:
        if name not in header:
            raise ConfigError(
                f"{printable(path)} has no column {name!r}; its columns are {list(header)}."
                f"{near_matches(name, header)} --image-column, --prompt-column and --id-column "
                "(image_column= and so on) name others"
            )
        if list(header).count(name) > 1:
            raise ConfigError(f"{printable(path)} has the column {name!r} twice")


def _csv(path: Path, names: Sequence[str]) -> tuple[dict[str, list[Any]], Sequence[int]]:
    shown = printable(path)
    lines = parse_csv(read_text(path, most=_LIST_BYTES), where=shown)
    (_, header), rows = (lines[0], lines[1:]) if lines else ((0, []), [])
    _require_columns(names, header, path)
    for number, cells in rows:
        if len(cells) != len(header):
            raise ConfigError(
                f"{shown}, line {number} has {len(cells)} values for {len(header)} columns; "
                "put values with commas in quotes"
            )
    columns = {name: [cells[header.index(name)] for _, cells in rows] for name in names}
    return columns, [number for number, _ in rows]


def _jsonl(path: Path, names: Sequence[str]) -> tuple[dict[str, list[Any]], Sequence[int]]:
    shown = printable(path)
    objects, broken = parse_json_lines(read_text(path, most=_LIST_BYTES), where=shown)
    if broken:
        raise ConfigError(broken[0][1])
    if objects:
        _require_columns(names, list(dict.fromkeys(key for _, row in objects for key in row)), path)
    columns = {name: [row.get(name) for _, row in objects] for name in names}
    return columns, [number for number, _ in objects]


def _parquet(path: Path, names: Sequence[str]) -> tuple[dict[str, list[Any]], Sequence[int]]:
    parquet = require("pyarrow.parquet", extra="parquet")
    try:
        with parquet.ParquetFile(path) as file:
            header = list(file.schema_arrow.names)
            _require_columns(names, header, path)
            table = file.read(columns=list(names))
            columns = {name: table[name].to_pylist() for name in names}
    except ConfigError:
        raise
    except Exception as error:  # pyarrow has errors of its own
        raise ConfigError(f"cannot read {printable(path)}: {reason(error)}") from error
    return columns, range(1, table.num_rows + 1)
