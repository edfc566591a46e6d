"""Answers and their reviews on disk, one line each, so that nothing is asked twice."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffenc.evals.json_lines import JsonLinesFile, Wording
from diffenc.storage.schema import checked

Key = tuple[str, str, str]
"""Name of the model or judge, part of the protocol, id of the item."""


class RecordsFile(JsonLinesFile):
    """JSON lines: the task, who answers, and every answer as it comes.

    The first line describes the task, one line each model (or judge), and every other line holds
    one answer, or one review of an answer. What an answer was made from is kept as a digest: an
    answer to another question, prompt or picture is never taken for this one.

    Args:
        path: Path of the file, which is created if it does not exist.
        task: Name of the benchmark or protocol; it must equal that of an existing file.
        source: Origin of the items; written into the file, not compared.

    Raises:
        ConfigError: The file belongs to something else, or a line is broken.
        OutputError: It cannot be read or written.
    """

    wording = Wording(
        header="answers",
        line="answer",
        keys=("model", "part", "item"),
        value="answer",
        foreign="holds no answers",
        other_run="belongs to another run",
        values="answers",
        made_from="the question, prompt or pictures",
        again="ask its question again, or begin anew with --force",
        instead="Take another file, or begin anew with --force",
        instead_of_name="Take another file or another name, or begin anew with --force",
    )

    parts = str

    def __init__(self, path: Path, task: str, *, source: str = "") -> None:
        super().__init__(path, {"task": task}, source=source)

    def check_value(self, value: Any) -> str:
        """An answer is a text."""
        answer: str = checked(value, str, "answer")
        return answer

    def add_speaker(self, name: str, description: Mapping[str, Any]) -> None:
        """Note what the answers of a model, or the reviews of a judge, depend on.

        Raises:
            ConfigError: The file holds those of another one by that name.
        """
        self._add_model(name, description)
