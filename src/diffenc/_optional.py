"""What some parts need beyond what the package asks for: other packages, and newer versions."""

import importlib
from types import ModuleType

from packaging.version import Version

from diffenc.errors import ConfigError, MissingExtraError


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


def require_transformers(oldest: str, *, to: str, why: str) -> None:
    """Raise a `ConfigError` where the installed transformers is too old.

    Args:
        oldest: Oldest version that will do.
        to: What needs it, the beginning of the message.
        why: The reason, and what to do; the end of the message.
    """
    import transformers

    if Version(transformers.__version__) < Version(oldest):
        raise ConfigError(
            f"{to} needs transformers {oldest} or newer, and {transformers.__version__} is "
            f"installed: {why}"
        )
