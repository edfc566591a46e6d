"""NaturalBench, groups of two pictures and two questions, from the files in which it is passed on.

Source:
    Li et al. 2024 (NaturalBench), arXiv:2410.14669, section 3, and its released evaluation.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffenc.errors import ConfigError
from diffenc.evals.choices.base import ChoiceBenchmark, ChoiceItem
from diffenc.evals.files import resolve_data
from diffenc.evals.items import Problem, picture_of
from diffenc.evals.rows import Column, Row, TableRows, read_parquet, rows_of

REPOSITORIES = ("BaiqiL/NaturalBench",)
GROUPS = 1900

SUFFIXES = {
    "yes_no": "Please answer Yes or No.",
    "multiple_choice": "Please output the letter corresponding to the correct option.",
}
"""What the released evaluation adds to a question, by its type."""

_PICTURES = ("Image_0", "Image_1")
_COLUMNS = (
    Column("Index", also=("id",)),
    *(Column(name, kind="any") for name in _PICTURES),
    Column("Question_0", kind="text"),
    Column("Question_1", kind="text"),
    *(Column(f"Image_{i}_Question_{q}", kind="text") for q in (0, 1) for i in (0, 1)),
    Column("Question_Type", also=("Question Type",)),
    Column("Source", needed=False),
)
_OPTIONS = re.compile(
    r"\bA\s*[:.)]\s*(?P<a>.+?)[;,.]?\s*\(?(?:\bOption\s+)?\bB\s*[:.)]\s*(?P<b>.+?)[;.]?\s*$",
    re.DOTALL,
)
_THIRD = re.compile(r"\bC\s*[:)]\s*\S")
_ANSWERS = {"yes_no": ("yes", "no"), "multiple_choice": ("a", "b")}


def load_naturalbench(
    data: "str | os.PathLike[str]", *, instruction: str | None = None
) -> ChoiceBenchmark:
    """Read NaturalBench's parquet files; nothing is downloaded.

    Args:
        data: Path of a folder, or "BaiqiL/NaturalBench" if the dataset is in the Hub's cache.
        instruction: Text that follows each question; None takes the released evaluation's, which
            depends on the type of the question; "" adds nothing.

    Returns:
        The questions, four of a group in the order (question 0, picture 0), (0, 1), (1, 0), (1, 1);
        what is wrong with files is in `problems`, and refused by `evaluate_choices`.

    Raises:
        ConfigError: There is no such dataset, or a column is missing.
        MissingExtraError: pyarrow is not installed.
    """
    files = resolve_data(data, REPOSITORIES)
    names = files.named("*.parquet")
    if not names:
        raise ConfigError(
            f"{files.source} is no NaturalBench: no .parquet file in it, but "
            f"{files.names[:5] or 'nothing'}; download the files of {REPOSITORIES[0]}"
        )
    paths = [files.path(name) for name in names]
    if None in paths:
        raise ConfigError(f"{names[0]} lies inside an archive; unpack it first")
    table = read_parquet(paths, _COLUMNS, _PICTURES, names[0])
    return _benchmark(table, str(files.source), instruction)


def naturalbench_from_rows(
    rows: Sequence[Mapping[str, Any]], *, instruction: str | None = None
) -> ChoiceBenchmark:
    """NaturalBench from rows in memory, such as split "train" of `datasets.load_dataset`.

    Args:
        rows: Rows with the Hub's columns; a picture is a PIL image, bytes, or `{"bytes": ...}`.
        instruction: Text that follows each question, see `load_naturalbench`.

    Raises:
        ConfigError: A column is missing.
    """
    return _benchmark(rows_of(rows, _COLUMNS, "rows"), "rows", instruction)


def _benchmark(table: TableRows, source: str, instruction: str | None) -> ChoiceBenchmark:
    groups: dict[str, list[ChoiceItem]] = {}
    problems = list(table.problems)
    for row in table.rows:
        name = row.text("Index")
        if name in groups:
            problems.append(Problem("ids that occur twice", f"group {name}", row.where))
        elif items := _group(row, problems, instruction):
            groups[name] = items
    notes = []
    if len(groups) != GROUPS:
        notes.append(
            f"{len(groups)} groups where NaturalBench has {GROUPS}: results are not those of the "
            "benchmark"
        )
    return ChoiceBenchmark(
        name="naturalbench",
        source=source,
        items=tuple(item for items in groups.values() for item in items),
        score="groups",
        expected=4 * GROUPS,
        problems=tuple(problems),
        notes=(*table.notes, *notes),
    )


def _group(row: Row, problems: list[Problem], instruction: str | None) -> list[ChoiceItem]:
    """The four questions of a row, or none where something is wrong with it."""
    name, kind = row.text("Index"), row.text("Question_Type")
    where = f"group {name}" if name else row.where
    texts = [row.text(f"Question_{question}") for question in (0, 1)]
    options = [_options(text, kind) for text in texts]
    pictures = [picture_of(row.values.get(each), f"{where}, {each}") for each in _PICTURES]
    words = _ANSWERS.get(kind, ())
    answers = {
        (question, image): row.text(f"Image_{image}_Question_{question}").strip().lower()
        for question in (0, 1)
        for image in (0, 1)
    }
    faults = []
    if not name:
        faults.append(Problem("rows without an id", row.where))
    if not all(texts):
        faults.append(Problem("missing questions", where))
    if None in pictures:
        faults.append(Problem("missing pictures", where))
    if kind not in SUFFIXES:
        faults.append(Problem("unknown types of question", where, kind))
    elif not all(options):
        faults.append(Problem("questions without options", where))
    elif unknown := [answer for answer in answers.values() if answer not in words]:
        faults.append(Problem("answers that are no option", where, unknown[0]))
    problems += faults
    if faults:
        return []
    suffix = SUFFIXES[kind] if instruction is None else instruction
    return [
        ChoiceItem(
            id=f"{name}-q{question}-i{image}",
            pictures=tuple(picture for picture in (pictures[image],) if picture is not None),
            question=texts[question],
            text=f"{texts[question]} {suffix}".strip(),
            options=options[question],
            answer=words.index(answer),
            group=name,
            labels={"question": str(question), "image": str(image), "type": kind},
        )
        for (question, image), answer in answers.items()
    ]


def _options(question: str, kind: str) -> tuple[str, ...]:
    """Words of the two options; () where the question should name two and does not."""
    if kind != "multiple_choice":
        return ("Yes", "No")
    named = _OPTIONS.search(question)
    if named is None or _THIRD.search(named["b"]):
        return ()
    words = (named["a"].strip(), named["b"].strip())
    return words if all(re.search(r"\w", each) for each in words) else ()
