"""Published tables as data: JSON files beside the modules that read them."""

from functools import cache
from importlib.resources import files
from typing import Any

from diffenc.errors import ConfigError
from diffenc.storage.reading import read_json

_FILE = "paper_tables.json"


@cache
def read_tables(package: str) -> dict[str, Any]:
    """The file of a package: its `source`, and its `tables` by name."""
    content: dict[str, Any] = read_json(str(files(package) / _FILE))
    return content


def find_table(package: str, name: str) -> dict[str, Any]:
    """A table by name.

    Raises:
        ConfigError: There is none of that name.
    """
    tables: dict[str, dict[str, Any]] = read_tables(package)["tables"]
    if name not in tables:
        raise ConfigError(f"there is no table {name!r}; known are {sorted(tables)}")
    return tables[name]
