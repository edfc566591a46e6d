"""BLINK: fourteen tasks of perception, many on several pictures.

Source:
    Fu et al. 2024 (BLINK), arXiv:2404.12390, and its released evaluation.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from diffenc.errors import ConfigError
from diffenc.evals.choices.base import LETTER_INSTRUCTION, ChoiceBenchmark, ChoiceItem
from diffenc.evals.files import resolve_data
from diffenc.evals.items import Problem, picture_of
from diffenc.evals.rows import Column, Row, plain_name, read_parquet, rows_of

REPOSITORIES = ("BLINK-Benchmark/BLINK",)

TASKS = {
    "Visual_Similarity": 135,
    "Counting": 120,
    "Relative_Depth": 124,
    "Jigsaw": 150,
    "Art_Style": 117,
    "Functional_Correspondence": 130,
    "Semantic_Correspondence": 139,
    "Spatial_Relation": 143,
    "Object_Localization": 122,
    "Visual_Correspondence": 172,
    "Multi-view_Reasoning": 133,
    "Relative_Reflectance": 134,
    "Forensic_Detection": 132,
    "IQ_Test": 150,
}
"""Tasks in the benchmark's order, and how many questions each has in the split "val"."""

PICTURES = ("image_1", "image_2", "image_3", "image_4")

_COLUMNS = (
    Column("idx", also=("id",)),
    Column("question", kind="text"),
    Column("choices", kind="any"),
    Column("answer"),
    Column("prompt", needed=False),
    Column("image_1", kind="any"),
    *(Column(name, needed=False, kind="any") for name in PICTURES[1:]),
)
_KNOWN = {plain_name(name): name for name in TASKS}


def load_blink(
    data: "str | os.PathLike[str]",
    *,
    split: str = "val",
    tasks: Sequence[str] | None = None,
    instruction: str = LETTER_INSTRUCTION,
) -> ChoiceBenchmark:
    """Read BLINK's parquet files, `<Task>/val-00000-of-00001.parquet`; nothing is downloaded.

    Args:
        data: Path of a folder, or "BLINK-Benchmark/BLINK" if the dataset is in the Hub's cache.
        split: Name of the split to read: "val"; the answers of "test" are not public.
        tasks: Names of the tasks to read, some of `TASKS`; None reads all of them.
        instruction: Text that follows the question and its options, on a line of its own; "" keeps
            the benchmark's own wording. Its disclaimer for three tasks is not put in front.

    Returns:
        The questions; what is wrong with files is in `problems`, and refused by `evaluate_choices`.

    Raises:
        ConfigError: There is no such dataset, a column is missing, a task is unknown, or answers
            are hidden.
        MissingExtraError: pyarrow is not installed.
    """
    chosen = _tasks(tasks)
    files = resolve_data(data, REPOSITORIES)
    parts: defaultdict[str, list[str]] = defaultdict(list)
    for name in files.named("*.parquet"):
        path = PurePosixPath(name)
        task = _KNOWN.get(plain_name(path.parent.name))
        if task and path.name.lower().startswith(split.lower()):
            parts[task].append(name)
    if not parts:
        raise ConfigError(
            f"{files.source} is no BLINK: no <Task>/{split}-*.parquet in it, but "
            f"{files.names[:5] or 'nothing'}"
        )
    rows: list[tuple[str, Row]] = []
    problems: list[Problem] = []
    for task in chosen:
        if task not in parts:
            problems.append(Problem("missing tasks", task))
        for name in parts.get(task, ()):
            place = files.path(name)
            if place is None:
                raise ConfigError(f"{name} lies inside an archive; unpack it first")
            table = read_parquet([place], _COLUMNS, PICTURES, name)
            problems += table.problems
            rows += [(task, row) for row in table.rows]
    return _benchmark(rows, str(files.source), chosen, problems, instruction)


def blink_from_rows(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], *, instruction: str = LETTER_INSTRUCTION
) -> ChoiceBenchmark:
    """BLINK from rows in memory, by task, such as those of `datasets.load_dataset`.

    Args:
        rows: Rows of each task, by name of the task; a picture is a PIL image, bytes,
            `{"bytes": ...}` or None.
        instruction: Text that follows the question and its options, see `load_blink`.

    Raises:
        ConfigError: A column is missing, a task is unknown, or answers are hidden.
    """
    if not isinstance(rows, Mapping) or not all(isinstance(name, str) for name in rows):
        raise ConfigError("rows must be a mapping from the names of tasks to their rows")
    chosen = _tasks(list(rows))
    by_task = {_KNOWN[plain_name(name)]: task_rows for name, task_rows in rows.items()}
    tables = {task: rows_of(by_task[task], _COLUMNS, task) for task in chosen}
    task_rows = [(task, row) for task in chosen for row in tables[task].rows]
    problems = [problem for table in tables.values() for problem in table.problems]
    return _benchmark(task_rows, "rows", chosen, problems, instruction)


def _tasks(tasks: Sequence[str] | None) -> list[str]:
    if tasks is None:
        return list(TASKS)
    if unknown := [name for name in tasks if plain_name(name) not in _KNOWN]:
        raise ConfigError(f"unknown tasks {unknown}; BLINK has {list(TASKS)}")
    chosen = {_KNOWN[plain_name(name)] for name in tasks}
    if not chosen or len(chosen) < len(tasks):
        raise ConfigError(f"tasks must be one or more, each once, got {list(tasks)}")
    return [name for name in TASKS if name in chosen]


def _benchmark(
    rows: Sequence[tuple[str, Row]],
    source: str,
    chosen: Sequence[str],
    problems: list[Problem],
    instruction: str,
) -> ChoiceBenchmark:
    if rows and all(row.text("answer").lower() == "hidden" for _, row in rows):
        raise ConfigError(
            f"{source} holds questions whose answers are hidden, as those of BLINK's split test; "
            "use the split val"
        )
    items: dict[str, ChoiceItem] = {}
    for task, row in rows:
        item = _item(task, row, problems, instruction)
        if item is not None and item.id in items:
            problems.append(Problem("ids that occur twice", item.id, row.where))
        elif item is not None:
            items[item.id] = item
    notes = []
    counts = {task: sum(item.group == task for item in items.values()) for task in chosen}
    if other := [f"{t}: {n} of {TASKS[t]}" for t, n in counts.items() if n != TASKS[t]]:
        notes.append(f"results are not those of the benchmark, {'; '.join(other)}")
    if lacking := len(TASKS) - len(chosen):
        notes.append(f"{lacking} of {len(TASKS)} tasks are left out of the mean")
    return ChoiceBenchmark(
        name="blink",
        source=source,
        items=tuple(items.values()),
        score="tasks",
        groups=tuple(TASKS),
        expected=sum(TASKS.values()),
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _item(task: str, row: Row, problems: list[Problem], instruction: str) -> ChoiceItem | None:
    where = row.text("idx") or row.where
    options = _options(row.values.get("choices"))
    letter = row.text("answer").strip("() ").upper()
    answer = "ABCDEFGHIJ".find(letter) if len(letter) == 1 else -1
    pictures = [
        picture_of(row.values[name], f"{where}, {name}")
        for name in PICTURES
        if row.values.get(name) is not None
    ]
    faults = []
    if not row.text("idx"):
        faults.append(Problem("rows without an id", row.where))
    if not row.text("question"):
        faults.append(Problem("missing questions", where))
    if len(options) < 2:
        faults.append(Problem("questions without options", where))
    elif not 0 <= answer < len(options):
        faults.append(Problem("answers that are no option", where, row.text("answer")))
    if not pictures or None in pictures:
        faults.append(Problem("missing pictures", where))
    problems += faults
    if faults:
        return None
    text = row.text("prompt") or _prompt(row.text("question"), options)
    return ChoiceItem(
        id=row.text("idx"),
        pictures=tuple(picture for picture in pictures if picture is not None),
        question=row.text("question"),
        text=f"{text}\n{instruction}" if instruction else text,
        options=options,
        answer=answer,
        group=task,
    )


def _prompt(question: str, options: Sequence[str]) -> str:
    lines = [f"({letter}) {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False)]
    return "\n".join([question, "Select from the following choices.", *lines])


def _options(value: Any) -> tuple[str, ...]:
    """Texts of a list; () where it is none, or holds something else."""
    known = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    return tuple(each.strip() for each in value) if known else ()
