"""Plans from TOML: the bundled ones, and those of users.

Trainings and measurements are tables by name, ``[train.NAME]`` and ``[measure.NAME]``; findings are
a list, ``[[finding]]``. What all trainings share stands once, in ``[model]``, ``[align]``,
``[instruct]`` and ``[adapt]``.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any

from diffenc.config import check_choice
from diffenc.errors import ConfigError
from diffenc.storage.reading import parse_toml, read_text
from diffenc.storage.schema import make
from diffenc.studies.vlm.findings import Finding, parse_claim
from diffenc.studies.vlm.measurements import Measurement
from diffenc.studies.vlm.plan import StudyData, StudyPlan
from diffenc.studies.vlm.trainings import Shared, Training

_PLANS = files("diffenc.studies.vlm") / "plans"

STUDIES = tuple(sorted(each.name.removesuffix(".toml") for each in _PLANS.iterdir()))
"""Names of the bundled studies: each has a file in the folder `plans`."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def bundled_plan(name: str) -> StudyPlan:
    """A bundled study.

    Raises:
        ConfigError: There is none of that name.
    """
    return parse_plan(name, bundled_text(name))


def bundled_text(name: str) -> str:
    """The TOML of a bundled study, to be copied and edited.

    Raises:
        ConfigError: There is none of that name.
    """
    check_choice("study", name, STUDIES)
    return read_text(str(_PLANS / f"{name}.toml"))


def read_plan(name: str, path: "str | os.PathLike[str]") -> StudyPlan:
    """A study from a file.

    Args:
        name: Name of the study and of its files.
        path: Path of a TOML file in the form of the bundled studies.

    Raises:
        ConfigError: It cannot be read, or something in it is wrong.
    """
    return parse_plan(name, read_text(path), source=os.fspath(path))


def parse_plan(name: str, text: str, *, source: str = "") -> StudyPlan:
    """A study from TOML.

    Raises:
        ConfigError: Something in it is wrong; the place is named.
    """
    values = parse_toml(text, where=source or name)
    try:
        if isinstance(values.get("finding"), Mapping):
            raise ConfigError("findings are a list: write [[finding]] with two brackets")
        tables: _Tables = make(_Tables, values)
        return tables.plan(name)
    except ConfigError as error:
        if not source:
            raise
        raise ConfigError(f"{source}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    """Keys and tables of a file, by their names there."""

    title: str
    about: str
    train: Mapping[str, Mapping[str, Any]]
    measure: Mapping[str, Mapping[str, Any]]
    finding: Sequence[Mapping[str, Any]] = ()
    paper: tuple[str, ...] = ()
    seeds: int = 3
    plots: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    align: Mapping[str, Any] = field(default_factory=dict)
    instruct: Mapping[str, Any] = field(default_factory=dict)
    adapt: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, name: str) -> StudyPlan:
        return StudyPlan(
            name=name,
            title=_one_line(self.title),
            about=_one_line(self.about),
            seeds=self.seeds,
            paper=self.paper,
            plots=self.plots,
            data=make(StudyData, self.data, "data"),
            shared=Shared(**{each.name: getattr(self, each.name) for each in fields(Shared)}),
            trainings=_by_name(Training, self.train, "train"),
            measurements=_by_name(Measurement, self.measure, "measure"),
            findings=tuple(
                make(_finding, values, f"finding {number}")
                for number, values in enumerate(self.finding, start=1)
            ),
        )


def _by_name(kind: Any, tables: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    made = {}
    for name, values in tables.items():
        if not _NAME.fullmatch(name):  # it stands in comparisons of figures and in file names
            raise ConfigError(
                f"{where}.{name}: names have small letters, digits, '.', '-' and '_', and begin "
                "with a letter or a digit"
            )
        made[name] = make(kind, values, f"{where}.{name}", own={"name": name})
    return made


def _finding(*, statement: str, paper: str, holds_if: tuple[str, ...], if_not: str = "") -> Finding:
    if not holds_if:
        raise ConfigError(f"the finding {statement!r}: holds_if needs one comparison or more")
    claims = tuple(map(parse_claim, holds_if))
    return Finding(_one_line(statement), _one_line(paper), claims, _one_line(if_not))


def _one_line(text: str) -> str:
    return " ".join(text.split())
