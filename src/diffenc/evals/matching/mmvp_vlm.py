"""MMVP-VLM from the layouts in which it is passed on.

Source:
    Tong et al. 2024 (Eyes Wide Shut), arXiv:2401.06209, and its released evaluation.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from diffenc.errors import ConfigError
from diffenc.evals.files import PICTURE_SUFFIXES, DatasetFiles, resolve_data
from diffenc.evals.items import Picture, Problem
from diffenc.evals.matching.base import Item, MatchingBenchmark
from diffenc.evals.rows import Column, Row, plain_name, read_csv, whole_number

REPOSITORIES = ("MMVP/MMVP_VLM",)
TEMPLATE = "a photo of {}"
ITEMS = 135

PATTERNS = {
    "Orientation": "Orientation and Direction",
    "Presence": "Presence of Specific Features",
    "State": "State and Condition",
    "Quantity": "Quantity and Count",
    "Spatial": "Positional and Relational Context",
    "Color": "Color and Appearance",
    "Structural Character": "Structural Characteristics",
    "Text": "Texts",
    "Camera Perspective": "Viewpoint and Perspective",
}
"""Types of the benchmark, in its order, and the names that papers give them."""

_COLUMNS = (
    Column("Question ID", also=("lndex", "Index", "id")),
    Column("Type", also=("pattern", "category")),
    Column("Statement", also=("caption", "text"), kind="text"),
)
_FOLDERS = ("mllmvlmimages", "mmvpvlmimages")
_KNOWN = {plain_name(name): name for name in PATTERNS}


def load_mmvp_vlm(data: "str | os.PathLike[str]") -> MatchingBenchmark:
    """Read MMVP-VLM; nothing is downloaded.

    Read are `Questions.csv` and the pictures `<folder>/<Type>/<Question ID>.jpg`, with the names of
    the Hub (`MLLM_VLM Images`, `Camera Perspective`) or of the code repository (`MMVP_VLM_Images`,
    `Camera_Perspective`), in a folder, in folders in it, or in a .zip file. Question 2k - 1 and 2k
    are a pair.

    Args:
        data: Path of a folder or a .zip file, or "MMVP/MMVP_VLM" if the dataset is in the Hub's
            cache.

    Returns:
        The pairs; what is wrong with files is in `problems`, and refused by `evaluate`.

    Raises:
        ConfigError: There is no such dataset, or a column is missing.
    """
    files = resolve_data(data, REPOSITORIES)
    tables = files.named("Questions.csv")
    if not tables:
        raise ConfigError(
            f"{files.source} is no MMVP-VLM: it holds no Questions.csv, which has the statements, "
            f"but {files.names[:5] or 'nothing'}. Rows of load_dataset have pictures alone: "
            f"download the files of {REPOSITORIES[0]}."
        )
    name = min(tables, key=lambda name: (name.count("/"), name))
    table = read_csv(files.reader(name)(), _COLUMNS, name)
    problems = list(table.problems)
    questions = _questions(table.rows, problems)
    items = _pairs(questions, _pictures(files), files, problems)
    unknown = sorted({row.text("Type") for row in questions.values()} - set(PATTERNS))
    unknown = [kind for kind in unknown if plain_name(kind) not in _KNOWN]
    notes = [f"types that the benchmark does not have: {unknown}"] if unknown else []
    return MatchingBenchmark(
        name="mmvp-vlm",
        source=str(files.source),
        items=tuple(items),
        label_kind="pattern",
        average="labels",
        template=TEMPLATE,
        expected=ITEMS,
        problems=tuple(problems),
        notes=(*table.notes, *notes),
    )


def _questions(rows: Sequence[Row], problems: list[Problem]) -> dict[int, Row]:
    questions: dict[int, Row] = {}
    for row in rows:
        text = row.text("Question ID")
        number = whole_number(text) or 0
        if number < 1:
            problems.append(Problem("ids that are no number", row.where, repr(text)))
        elif number in questions:
            problems.append(Problem("ids that occur twice", f"question {number}", row.where))
        else:
            questions[number] = row
    return questions


def _pictures(files: DatasetFiles) -> Mapping[tuple[str, str], str]:
    """Pictures by type and number; those below a folder of a known name come first."""
    names: dict[tuple[str, str], str] = {}
    for name in files.names:
        path = PurePosixPath(name)
        if path.suffix.lower() not in PICTURE_SUFFIXES or len(path.parts) < 2:
            continue
        key = (plain_name(path.parts[-2]), path.stem.strip().lstrip("0"))
        known = any(plain_name(part) in _FOLDERS for part in path.parts[:-2])
        if key not in names or known:
            names[key] = name
    return names


def _pairs(
    questions: Mapping[int, Row],
    pictures: Mapping[tuple[str, str], str],
    files: DatasetFiles,
    problems: list[Problem],
) -> list[Item]:
    items = []
    for first in sorted({number - (number + 1) % 2 for number in questions}):
        pair = f"pair {first}-{first + 1}"
        if absent := [n for n in (first, first + 1) if n not in questions]:
            problems.append(Problem("incomplete pairs", pair, f"no question {absent[0]}"))
            continue
        rows = (questions[first], questions[first + 1])
        kinds = [row.text("Type") for row in rows]
        if plain_name(kinds[0]) != plain_name(kinds[1]):
            problems.append(Problem("pairs of two types", pair, " and ".join(map(repr, kinds))))
            continue
        captions = (rows[0].text("Statement"), rows[1].text("Statement"))
        if not all(captions):
            problems.append(Problem("missing captions", pair))
        shown = []
        for number in (first, first + 1):
            name = pictures.get((plain_name(kinds[0]), str(number)))
            if name is None:
                detail = f"{kinds[0]}/{number}.jpg"
                problems.append(Problem("missing pictures", pair, detail))
            else:
                shown.append(Picture(name, files.reader(name)))
        if len(shown) == 2 and all(captions):
            label = _KNOWN.get(plain_name(kinds[0]), kinds[0])
            labels = {"pattern": (label,)}
            items.append(Item(f"{first}-{first + 1}", (shown[0], shown[1]), captions, labels))
    return items
