"""The log of a run: JSON lines with step, epoch, loss, learning rate and norm of the gradient."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffenc.errors import ConfigError
from diffenc.storage.lines import parse_json_lines
from diffenc.storage.reading import read_text
from diffenc.storage.schema import checked

LOG_FILE = "log.jsonl"

Progress = Callable[[int, int, float | None], None]
"""Function called after each step with the steps done, all steps, and the last logged loss."""


def read_log(folder: "str | os.PathLike[str]") -> list[dict[str, Any]]:
    """Lines of a run's log: step, epoch, loss, learning_rate, grad_norm.

    Raises:
        ConfigError: There is none, or a line is broken.
    """
    lines, problems = log_lines(Path(folder) / LOG_FILE)
    if problems:
        raise ConfigError(f"{Path(folder) / LOG_FILE} is broken: {problems[0]}")
    return lines


def log_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of a log, and what is wrong with those that cannot be read.

    Raises:
        ConfigError: The file cannot be read.
    """
    lines: list[dict[str, Any]] = []
    objects, broken = parse_json_lines(read_text(path), where=path.name)
    problems = [detail for _, detail in broken]
    for number, line in objects:
        try:
            checked(line, dict[str, float], f"{path.name}, line {number}")
            checked(line.get("step"), int, f"{path.name}, line {number}: step")
            lines.append(line)
        except ConfigError as error:
            problems.append(str(error))
    return lines, problems
