"""Optional dependencies: imported when needed, named with the extra that brings them."""

import importlib
from types import ModuleType

from diffenc.errors import MissingExtraError


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: Dotted name, such as "matplotlib".
        extra: The extra of diffenc that installs it, such as "viz".

    Raises:
        MissingExtraError: It is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"this needs {module.partition('.')[0]}, which is not installed; "
            f"run: pip install 'diffenc[{extra}]'"
        ) from error
