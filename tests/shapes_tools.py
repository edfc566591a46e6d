"""The scripts that train and measure the miniature models, as modules."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "tools" / "shapes"


@contextmanager
def shapes_tools(*names: str) -> Iterator[dict[str, ModuleType]]:
    """Modules by name; they import each other as scripts do, and are forgotten afterwards."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)
