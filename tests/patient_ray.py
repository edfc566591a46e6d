"""Ray on a machine that is busy with other things."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

_SETTINGS = {
    "RAY_agent_register_timeout_ms": "300000",  # half a minute by default
    "RAY_worker_niceness": "0",  # by default workers give way to everything, and hardly run
}


@contextmanager
def patient_ray() -> Iterator[None]:
    """Settings under which Ray starts later than by default, and its workers get their share."""
    with patch.dict(os.environ, _SETTINGS):
        yield


def start(ray: Any, times: int = 5) -> None:
    """Start Ray, which gives up after half a minute and may be asked again."""
    for left in reversed(range(times)):
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        except Exception:
            ray.shutdown()
            if not left:
                raise
        else:
            return
