"""LLaVA-Bench (In-the-Wild) from the files in which it is passed on.

Source:
    Liu et al. 2023 (LLaVA), arXiv:2304.08485, section 5.1, and its released evaluation.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from diffenc.errors import ConfigError
from diffenc.evals.files import DatasetFiles, resolve_data
from diffenc.evals.items import Benchmark, Picture, Problem
from diffenc.evals.rows import Column, Row, TableRows, read_jsonl
from diffenc.storage.reading import decode, parse_json
from diffenc.storage.schema import checked

REPOSITORIES = ("liuhaotian/llava-bench-in-the-wild",)
CATEGORIES = ("complex", "conv", "detail")
ITEMS = 60

_QUESTIONS = (
    Column("question_id", also=("id",)),
    Column("image"),
    Column("text", also=("question",), kind="text"),
    Column("category", also=("type",)),
)
_CONTEXT = (Column("image"), Column("caption", kind="any"))
_ANSWERS = (Column("question_id", also=("id",)), Column("text", also=("answer",), kind="text"))


@dataclass(frozen=True, slots=True)
class BenchItem:
    """An open question on a picture.

    Attributes:
        id: Id of the question.
        picture: Picture that the question is about.
        question: Text of the question, to be answered in words.
        category: Kind of the question: "complex", "conv" or "detail".
        context: Description of the picture for the judge, who does not see it.
        reference: Answer that the model's answer is compared with.
    """

    id: str
    picture: Picture
    question: str
    category: str
    context: str
    reference: str

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The one picture."""
        return (self.picture,)


@dataclass(frozen=True, kw_only=True)
class LlavaBench(Benchmark[BenchItem]):
    """Open questions with reference answers.

    Attributes:
        rules: Instruction of the judge and name of those who answer, by category, from a
            `rule.json` among the files; without one, diffenc's own wording is taken.
    """

    rules: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def load_llava_bench(
    data: "str | os.PathLike[str]", *, reference: str = "answers_gpt4.jsonl"
) -> LlavaBench:
    """Read LLaVA-Bench; nothing is downloaded.

    Read are `questions.jsonl`, `context.jsonl`, the reference answers and `images/001.jpg`, in a
    folder, in folders in it, or in a .zip file. The judge's instruction is LLaVA's own where its
    `rule.json` (`llava/eval/table` of its code) lies among them.

    Args:
        data: Path of a folder or a .zip file, or the Hub id if the dataset is in the Hub's cache.
        reference: Name of the file that holds the reference answers.

    Raises:
        ConfigError: There is no such dataset, or a file or column is missing.
    """
    files = resolve_data(data, REPOSITORIES)
    tables = [
        _read(files, name, columns)
        for name, columns in (
            ("questions.jsonl", _QUESTIONS),
            ("context.jsonl", _CONTEXT),
            (reference, _ANSWERS),
        )
    ]
    problems = [problem for table in tables for problem in table.problems]
    contexts = {
        name: _caption(row.values.get("caption"))
        for name, row in _once(tables[1].rows, "image", "contexts that occur twice", problems)
    }
    answers = {
        name: row.text("text")
        for name, row in _once(tables[2].rows, "question_id", "answers that occur twice", problems)
    }
    items: dict[str, BenchItem] = {}
    for row in tables[0].rows:
        item = _item(row, files, contexts, answers, problems)
        if item is not None and item.id in items:
            problems.append(Problem("ids that occur twice", f"question {item.id}", row.where))
        elif item is not None:
            items[item.id] = item
    notes = [note for table in tables for note in table.notes if "is read as" in note]
    if unknown := sorted({item.category for item in items.values()} - set(CATEGORIES)):
        notes.append(f"categories that the benchmark does not have: {unknown}")
    if len(items) != ITEMS:
        notes.append(f"{len(items)} questions where the benchmark has {ITEMS}")
    rules = _rules(files, problems)
    notes.append(
        "the judge is instructed by rule.json"
        if rules
        else "no rule.json among the files: the judge's instruction is not LLaVA's own"
    )
    return LlavaBench(
        name="llava-bench",
        source=str(files.source),
        items=tuple(items.values()),
        rules=rules,
        expected=ITEMS,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _read(files: DatasetFiles, file: str, columns: Sequence[Column]) -> TableRows:
    names = files.named(file)
    if not names:
        raise ConfigError(
            f"{files.source} is no LLaVA-Bench: it holds no {file}, but "
            f"{files.names[:5] or 'nothing'}; download the files of {REPOSITORIES[0]}"
        )
    name = min(names, key=lambda name: (name.count("/"), name))
    return read_jsonl(files.reader(name)(), columns, name)


def _once(
    rows: Sequence[Row], column: str, kind: str, problems: list[Problem]
) -> Iterator[tuple[str, Row]]:
    """Rows by the value of a column; rows that repeat a value are problems."""
    known = set()
    for row in rows:
        name = row.text(column)
        if name in known:
            problems.append(Problem(kind, name, row.where))
        else:
            known.add(name)
            yield name, row


def _item(
    row: Row,
    files: DatasetFiles,
    contexts: Mapping[str, str],
    answers: Mapping[str, str],
    problems: list[Problem],
) -> BenchItem | None:
    name, image = row.text("question_id"), row.text("image")
    where = f"question {name}" if name else row.where
    picture = files.picture(image) if image else None
    faults = [
        Problem(kind, where, detail)
        for kind, there, detail in (
            ("rows without an id", name, ""),
            ("missing questions", row.text("text"), ""),
            ("missing categories", row.text("category"), ""),
            ("missing pictures", picture, image),
            ("missing contexts", contexts.get(image), image),
            ("missing reference answers", answers.get(name), ""),
        )
        if not there
    ]
    problems += faults
    if faults or picture is None:
        return None
    return BenchItem(
        id=name,
        picture=Picture(picture, files.reader(picture)),
        question=row.text("text"),
        category=row.text("category").removeprefix("llava_bench_"),
        context=contexts[image],
        reference=answers[name],
    )


def _caption(value: object) -> str:
    """A caption, or several as lines; "" where it is something else."""
    parts = value if isinstance(value, list) else [value]
    known = all(isinstance(part, str) for part in parts)
    return "\n".join(str(part).strip() for part in parts if part) if known else ""


def _rules(files: DatasetFiles, problems: list[Problem]) -> dict[str, tuple[str, str]]:
    names = files.named("rule.json")
    if not names:
        return {}
    try:
        content = parse_json(decode(files.reader(names[0])(), where=names[0]), where=names[0])
        there = {name: content.get(f"llava_bench_{name}") for name in CATEGORIES}
        rules = {
            name: checked(rule, dict[str, str], f"llava_bench_{name}")
            for name, rule in there.items()
            if rule is not None
        }
        return {name: (rule["prompt"], rule["role"]) for name, rule in rules.items()}
    except (ConfigError, KeyError) as error:
        problems.append(Problem("broken rules", names[0], str(error)))
        return {}
