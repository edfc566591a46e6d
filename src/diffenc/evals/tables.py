"""Published tables as data: JSON files beside the modules that read them."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

from diffenc.errors import ConfigError

_FILE = "paper_tables.json"


@cache
def read_tables(package: str) -> dict[str, Any]:
    """The file of a package: its `source`, and its `tables` by name."""
    text = (files(package) / _FILE).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
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
