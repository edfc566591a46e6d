"""Which commands make each row of the paper's tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from diffenc.evals.paper import published_table, published_tables
from diffenc.mllm.recipes import chain
from diffenc.storage.reading import parse_toml, read_text

_FILE = "paper_commands.toml"
_OPTIONS = ("options", "ask", "before")
_FOLDER = "recipes"
_KEPT = "-o "


@dataclass(frozen=True, slots=True)
class RowCommands:
    """How a row of the paper is made.

    Attributes:
        label: Model and settings of the row, as the table has them.
        trainings: Names of the recipes that are trained, in order.
        commands: Commands that follow, in order; the last ones give the row's numbers.
        note: What the paper leaves open, or what cannot be reached; "" is nothing.
    """

    label: str
    trainings: tuple[str, ...]
    commands: tuple[str, ...]
    note: str = ""

    @property
    def lines(self) -> tuple[str, ...]:
        """All commands, those that train first."""
        train = (f"diffenc train {_FOLDER}/{name}.toml" for name in self.trainings)
        return (*train, *self.commands)


def row_commands(table: str) -> tuple[RowCommands, ...]:
    """Commands for each row of a table: one of `published_tables()`.

    Raises:
        ConfigError: There is no table of that name.

    Examples:
        >>> row_commands("later-fusion")[-1].trainings
        ('cross-align', 'cross-instruct-s4')
    """
    labels = [row.label for row in published_table(table).rows]
    content = _content()
    entry = content["table"][table]
    rows = zip(labels, entry["rows"], strict=True)
    return tuple(
        _row(f"{table}-{number}", label, row, entry, content)
        for number, (label, row) in enumerate(rows, start=1)
    )


def _row(
    name: str, label: str, row: Mapping[str, Any], table: Mapping[str, Any], content: Any
) -> RowCommands:
    """A row from its own options, those of a dagger where it has one, and the table's."""
    own = {**table, **(table["dagger"] if row.get("dagger") else {}), **row}
    options: dict[str, Any] = {key: own.get(key) for key in _OPTIONS}
    before = [content["before"][each] for each in options["before"] or ()]
    runs = [each["run"] for each in before] + ([row["run"]] if "run" in row else [])
    trainings = dict.fromkeys(step.name for run in runs for step in chain(run))
    commands = [command for each in before for command in each["commands"]]
    for benchmark in options["ask"]:
        text = " ".join(filter(None, (content["ask"][benchmark], options["options"])))
        if "run" in row:  # a file of answers holds one setting
            text += f" {_KEPT}{name}{f'-{benchmark}' if len(options['ask']) > 1 else ''}.jsonl"
        elif "clip" in row:
            text += f" {_KEPT}{name}"
        fill = {"benchmark": benchmark, **table.get("fill", {}), **row}
        commands.append(text.format(**fill))
    return RowCommands(label, tuple(trainings), tuple(commands), row.get("note", ""))


def commands_page() -> str:
    """All rows with their commands as Markdown: the page `docs/results/paper-commands.md`."""
    content = _content()
    lines = [content["page"]["text"].strip() + "\n"]
    for name in published_tables():
        table = published_table(name)
        lines.append(f"## {table.title}\n")
        lines += [f"{note}\n" for note in content["table"][name].get("notes", ())]
        groups: dict[tuple[tuple[str, ...], str], list[str]] = {}
        for row in row_commands(name):
            groups.setdefault((row.lines, row.note), []).append(row.label)
        for (commands, note), labels in groups.items():
            lines.append(f"**{'; '.join(labels)}**\n")
            lines += [f"{note}\n"] * bool(note)
            lines += ["```console", *commands, "```\n"]
    return "\n".join(lines)


@cache
def _content() -> dict[str, Any]:
    path = str(files("diffenc.evals") / _FILE)
    return parse_toml(read_text(path), where=path)
