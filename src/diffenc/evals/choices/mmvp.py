"""MMVP, questions on pairs of pictures, from the layouts in which it is passed on.

Source:
    Tong et al. 2024 (Eyes Wide Shut), arXiv:2401.06209, and its released evaluation.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from diffenc.errors import ConfigError
from diffenc.evals.choices.base import LETTER_INSTRUCTION, ChoiceBenchmark, ChoiceItem
from diffenc.evals.files import PICTURE_SUFFIXES, DatasetFiles, resolve_data
from diffenc.evals.items import Picture, Problem, picture_of
from diffenc.evals.rows import (
    Column,
    Row,
    TableRows,
    plain_name,
    read_csv,
    read_parquet,
    rows_of,
    whole_number,
)

REPOSITORIES = ("MMVP/MMVP", "lmms-lab-eval/MMVP")
ITEMS = 300

ERRATA = (99, 100, 279, 280)
"""Questions whose right answers are exchanged within the pair in the original files."""

_COLUMNS = (
    Column("Index", also=("lndex", "Question ID", "id")),
    Column("Question", kind="text"),
    Column("Options", also=("Choices",), kind="text"),
    Column("Correct Answer", also=("Answer", "Correct_Answer")),
)
_PICTURE = (Column("image", also=("Image",), kind="any"),)
_FOLDERS = ("mmvpimages",)
_LETTERS = "abcdefghij"
_ALONE = re.compile(r"(?<!\w)\([a-j]\)", re.IGNORECASE)


def load_mmvp(
    data: "str | os.PathLike[str]",
    *,
    fix_errata: bool = False,
    instruction: str = LETTER_INSTRUCTION,
) -> ChoiceBenchmark:
    """Read MMVP; nothing is downloaded.

    Read are `Questions.csv`, whose first column is `Index` or `lndex`, and `MMVP Images/<k>.jpg`,
    in a folder, in folders in it, or in a .zip file; or the parquet files of the repaired mirror.
    Questions 2k - 1 and 2k are a pair.

    Args:
        data: Path of a folder or a .zip file, or a Hub id if the dataset is in the Hub's cache.
        fix_errata: Whether to exchange the answers of questions 99 and 100 and of 279 and 280,
            which are the wrong way round in the original files. The paper and most others used them
            as they are.
        instruction: Text that follows the question and its options, on a line of its own; "" keeps
            the official wording, whose free answers a language model judged.

    Returns:
        The questions; what is wrong with files is in `problems`, and refused by `evaluate_choices`.

    Raises:
        ConfigError: There is no such dataset, a column is missing, or `fix_errata` for the mirror,
            where they are put right already.
        MissingExtraError: Parquet files without pyarrow.
    """
    files = resolve_data(data, REPOSITORIES)
    tables = files.named("Questions.csv")
    parts = files.named("*.parquet")
    if tables:
        name = min(tables, key=lambda name: (name.count("/"), name))
        table = read_csv(files.reader(name)(), _COLUMNS, name)
        pictures = _pictures(files, {_number(row.text("Index")) for row in table.rows})
    elif parts:
        if fix_errata:
            raise ConfigError(
                f"{files.source} has parquet files, as the mirror in which errata are put right "
                "already: leave fix_errata out, or read the original Questions.csv"
            )
        paths = [files.path(part) for part in parts]
        if None in paths:
            raise ConfigError(f"{parts[0]} lies inside an archive; unpack it first")
        table = read_parquet(paths, (*_COLUMNS, *_PICTURE), ("image",), parts[0])
        pictures = {}
    else:
        raise ConfigError(
            f"{files.source} is no MMVP: it holds neither Questions.csv nor a .parquet file, but "
            f"{files.names[:5] or 'nothing'}. Rows of load_dataset have pictures alone: download "
            f"the files of {REPOSITORIES[0]}."
        )
    return _benchmark(table, pictures, str(files.source), fix_errata, instruction)


def mmvp_from_rows(
    rows: Sequence[Mapping[str, Any]],
    *,
    fix_errata: bool = False,
    instruction: str = LETTER_INSTRUCTION,
) -> ChoiceBenchmark:
    """MMVP from rows in memory, with the columns of the mirror and PIL images.

    Args:
        rows: Rows with `Index`, `Question`, `Options`, `Correct Answer` and `image`.
        fix_errata: Whether to exchange wrong answers, see `load_mmvp`; only for rows of the
            original data.
        instruction: Text that follows the question and its options, see `load_mmvp`.

    Raises:
        ConfigError: A column is missing.
    """
    table = rows_of(rows, (*_COLUMNS, *_PICTURE), "rows")
    return _benchmark(table, {}, "rows", fix_errata, instruction)


def split_options(text: str) -> tuple[str, ...]:
    """``"(a) Open (b) Closed"`` to ``("Open", "Closed")``; () where letters are not in order.

    Letters count in their order alone, so that "circle(s)" and "f(a)" hold none.
    """
    places: list[re.Match[str]] = []
    for letter in _LETTERS:
        start = places[-1].end() if places else 0
        mark = rf"\({letter}\)"
        place = _search(rf"(?<!\w){mark}", text, start) or _search(mark, text, start)
        if place is None:
            break
        places.append(place)
    if not places or text[: places[0].start()].strip():
        return ()
    ends = [match.start() for match in places[1:]] + [len(text)]
    words = [text[m.end() : end].strip(" ,;\t\n") for m, end in zip(places, ends, strict=True)]
    if len(words) < 2 or not all(words) or any(_ALONE.search(option) for option in words):
        return ()
    return tuple(words)


def _search(pattern: str, text: str, start: int) -> re.Match[str] | None:
    return re.compile(pattern, re.IGNORECASE).search(text, start)


def _benchmark(
    table: TableRows,
    pictures: Mapping[int, Picture],
    source: str,
    fix_errata: bool,
    instruction: str,
) -> ChoiceBenchmark:
    problems = list(table.problems)
    items: dict[int, ChoiceItem] = {}
    for row in table.rows:
        number = _number(row.text("Index"))
        where = f"question {number}"
        if number < 1:
            problems.append(Problem("ids that are no number", row.where, repr(row.text("Index"))))
        elif number in items:
            problems.append(Problem("ids that occur twice", where, row.where))
        else:
            picture = pictures.get(number) or picture_of(row.values.get("image"), where)
            item = _item(row, number, picture, problems, instruction)
            if item is not None:
                items[number] = item
    whole = [n for n in items if _partner(n) in items]
    for number in items.keys() - set(whole):
        detail = f"no question {_partner(number)}"
        problems.append(Problem("incomplete pairs", f"question {number}", detail))
    notes = list(table.notes)
    notes.append(
        f"the answers of questions {', '.join(map(str, ERRATA))} are "
        + ("exchanged within their pairs (fix_errata)" if fix_errata else "as in the file")
    )
    paired = {number: items[number] for number in sorted(whole)}
    alike = [n for n in paired if n % 2 and paired[n].answer == paired[n + 1].answer]
    if alike:
        notes.append(f"{len(alike)} pairs have the same answer twice, the first is {alike[0]}")
    if fix_errata:
        paired |= {n: _with_answer(paired[n], paired[_partner(n)]) for n in ERRATA if n in paired}
    return ChoiceBenchmark(
        name="mmvp",
        source=source,
        items=tuple(paired.values()),
        score="pairs",
        expected=ITEMS,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _item(
    row: Row, number: int, picture: Picture | None, problems: list[Problem], instruction: str
) -> ChoiceItem | None:
    where = f"question {number}"
    options = split_options(row.text("Options"))
    answer = _answer(row.text("Correct Answer"), options)
    faults = []
    if not row.text("Question"):
        faults.append(Problem("missing questions", where))
    if not options:
        faults.append(Problem("options without letters", where, repr(row.text("Options"))))
    elif answer is None:
        faults.append(Problem("answers that are no option", where, row.text("Correct Answer")))
    if picture is None:
        faults.append(Problem("missing pictures", where, f"{number}.jpg"))
    problems += faults
    if faults or picture is None or answer is None:
        return None
    question = row.text("Question")
    text = f"{question} {row.text('Options')}"
    first = number - (number + 1) % 2
    return ChoiceItem(
        id=str(number),
        pictures=(picture,),
        question=question,
        text=f"{text}\n{instruction}" if instruction else text,
        options=options,
        answer=answer,
        group=f"{first}-{first + 1}",
    )


def _with_answer(item: ChoiceItem, other: ChoiceItem) -> ChoiceItem:
    """An item with the answer that its partner had."""
    return ChoiceItem(
        item.id, item.pictures, item.question, item.text, item.options, other.answer, item.group
    )


def _partner(number: int) -> int:
    return number + 1 if number % 2 else number - 1


def _number(text: str) -> int:
    return whole_number(text) or 0


def _answer(text: str, options: Sequence[str]) -> int | None:
    """``"(b)"`` or ``"b"`` to 1."""
    letter = text.strip().strip("().").lower()
    index = _LETTERS.find(letter) if len(letter) == 1 else -1
    return index if 0 <= index < len(options) else None


def _pictures(files: DatasetFiles, numbers: set[int]) -> dict[int, Picture]:
    """Pictures of some questions by number; those in a folder of the known name come first."""
    names: dict[tuple[int, bool], list[str]] = {}
    for name in files.names:
        path = PurePosixPath(name)
        number = _number(path.stem.strip())
        known = any(plain_name(part) in _FOLDERS for part in path.parts[:-1])
        if path.suffix.lower() in PICTURE_SUFFIXES and number and number in numbers:
            names.setdefault((number, known), []).append(name)
    pictures = {}
    for number in {number for number, _ in names}:
        alike = names.get((number, True)) or names[number, False]
        name = files.one_of(alike, f"picture {number}")
        pictures[number] = Picture(name, files.reader(name))
    return pictures
