"""Ray on a machine that is busy with other things."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

SECONDS = 600
"""How long Ray may take to start; by itself it gives up after half a minute."""


@contextmanager
def patient_start() -> Iterator[None]:
    """Let Ray start slowly, and its workers run beside other programs; nothing where it is not."""
    try:
        from ray._private import services
    except ImportError:
        yield
        return
    get_node = services.get_node

    def wait(*args: Any, **options: Any) -> Any:
        end = time.monotonic() + SECONDS
        while True:
            try:
                return get_node(*args, **options)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    milliseconds = str(1000 * SECONDS)
    names = {"RAY_agent_register_timeout_ms": milliseconds, "RAY_worker_niceness": "0"}
    with patch.object(services, "get_node", wait), patch.dict(os.environ, names):
        yield
