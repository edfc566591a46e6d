"""Scores of items on disk, one line each, so that an interrupted run goes on where it stopped."""

from pathlib import Path
from typing import Any

from diffenc.errors import ConfigError
from diffenc.evals.base import Benchmark, Matcher
from diffenc.evals.json_lines import JsonLinesFile, Wording
from diffenc.storage.schema import checked

Key = tuple[str, int, str]
"""Name of the matcher, seed of the trial, id of the item."""

_INSTEAD = "Take another file, or begin anew with --force"


class ResultsFile(JsonLinesFile):
    """JSON lines: what is scored, by whom, and the scores as they come.

    The first line describes the benchmark, one line each model, and every other line holds the
    scores of one item in one trial, `[[s(image 0, text 0), s(0, 1)], [s(1, 0), s(1, 1)]]`. A
    digest says from which pictures and captions they were made.

    Args:
        path: Path of the file, which is created if it does not exist.
        benchmark: Benchmark whose items are scored.

    Raises:
        ConfigError: The file belongs to something else, or a line is broken.
        OutputError: It cannot be read or written.
    """

    wording = Wording(
        header="benchmark",
        line="score",
        keys=("model", "seed", "item"),
        value="scores",
        foreign="is no results file of diffenc",
        other_run="holds results of another run",
        values="scores",
        made_from="the pictures or captions",
        again="score its item again, or begin anew with --force",
        instead=_INSTEAD,
        instead_of_name=_INSTEAD,
    )

    parts = int

    def __init__(self, path: Path, benchmark: Benchmark) -> None:
        header = {"benchmark": benchmark.name, "template": benchmark.template}
        super().__init__(path, header, source=benchmark.source)

    def check_value(self, value: Any) -> Any:
        """Scores of two pictures and two captions, with parts or without."""
        scores = checked(value, list[list[float]] | list[list[list[float]]], "scores")
        if len(scores) != 2 or any(len(row) != 2 for row in scores):
            raise ConfigError(f"scores must be of two pictures and two captions, got {value}")
        if len({len(parts) for row in scores for parts in row if isinstance(parts, list)}) > 1:
            raise ConfigError(f"scores must all have as many parts, got {value}")
        return scores

    def add_matcher(self, matcher: Matcher) -> None:
        """Note what a model's scores depend on.

        Raises:
            ConfigError: The file holds scores of another model or configuration by that name.
        """
        self._add_model(matcher.name, matcher.description)
