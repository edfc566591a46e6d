"""Marks on single cases of parametrised tests."""

from typing import Any

import pytest


def wrong_type(*case: Any) -> Any:
    """A case that passes what annotations forbid, to see that the library answers all the same."""
    return pytest.param(*case, marks=pytest.mark.wrong_type)
