"""Scripts run as the command line runs them, but in this process: loading torch takes seconds."""

import contextlib
import io
import random
import runpy
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch


@dataclass(frozen=True)
class Outcome:
    """What a script left: its exit status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_script(path: Path, *arguments: str, folder: Path) -> Outcome:
    """Run a Python file as `__main__` in a working directory.

    Warnings are no errors. Modules of the script's own folder and random states are put back.

    Args:
        path: The script.
        arguments: Its command line.
        folder: Working directory.
    """
    out, err = io.StringIO(), io.StringIO()
    modules = set(sys.modules)
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", [str(path), *arguments]),
        patch.object(sys, "path", [str(path.parent), *sys.path]),
        torch.random.fork_rng(),
        warnings.catch_warnings(),
    ):
        monkeypatch.chdir(folder)
        warnings.simplefilter("ignore")
        returncode = _run(path)
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).parent == path.parent:
            del sys.modules[name]
    return Outcome(returncode, out.getvalue(), err.getvalue())


def _run(path: Path) -> int:
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
            return 1
        return end.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0
