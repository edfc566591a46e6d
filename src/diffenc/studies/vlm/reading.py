"""Plans from TOML: the bundled ones, and those of users.

Trainings and measurements are tables by name, ``[train.NAME]`` and ``[measure.NAME]``; findings are
a list, ``[[finding]]``. What all trainings share stands once, in ``[model]``, ``[align]``,
``[instruct]`` and ``[adapt]``.
"""

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib.resources import files
from typing import Any

from diffenc.config import check_choice
from diffenc.errors import ConfigError
from diffenc.storage.reading import parse_toml, read_text
from diffenc.studies.vlm.claims import parse_claim
from diffenc.studies.vlm.findings import Finding
from diffenc.studies.vlm.plan import Measurement, StudyData, StudyPlan
from diffenc.studies.vlm.toml_tables import (
    check_keys,
    check_name,
    check_present,
    make,
    table,
    texts,
)
from diffenc.studies.vlm.trainings import Shared, Training, read_training

STUDIES = (
    "guidance",
    "leakage",
    "prompts",
    "conditioning",
    "fusion",
    "lora",
    "captioner",
    "refinement",
)
"""Names of the bundled studies."""

_SHARED = tuple(each.name for each in fields(Shared))


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
    return read_text(str(files("diffenc.studies.vlm") / "plans" / f"{name}.toml"))


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
    told = parse_toml(text, where=source or name)
    try:
        return _from_dict(name, told)
    except ConfigError as error:
        if not source:
            raise
        raise ConfigError(f"{source}: {error}") from error


def _from_dict(name: str, told: Mapping[str, Any]) -> StudyPlan:
    known = ("title", "about", "paper", "seeds", "plots", "data", *_SHARED, "train", "measure")
    check_keys(told, (*known, "finding"), "")
    check_present(told, ("title", "about", "train", "measure"), "")
    shared = Shared(**{key: table(told.get(key, {}), key) for key in _SHARED})
    trainings: dict[str, Training] = {}
    for each, values in table(told["train"], "train").items():
        trainings[check_name(each, "train")] = read_training(each, table(values, f"train.{each}"))
    title, about = texts([told["title"], told["about"]], "title, about")
    return StudyPlan(
        name=name,
        title=" ".join(title.split()),
        about=" ".join(about.split()),
        seeds=told.get("seeds", 3),
        paper=texts(told.get("paper", []), "paper"),
        plots=texts(told.get("plots", []), "plots"),
        data=make(StudyData, table(told.get("data", {}), "data"), "data"),
        shared=shared,
        trainings=trainings,
        measurements={
            check_name(each, "measure"): _measurement(each, table(values, f"measure.{each}"))
            for each, values in table(told["measure"], "measure").items()
        },
        findings=_findings(told.get("finding", [])),
    )


def _measurement(name: str, values: dict[str, Any]) -> Measurement:
    where = f"measure.{name}"
    if "of" in values:
        values["of"] = texts(values["of"], f"{where}.of")
    if "options" in values:
        values["options"] = table(values["options"], f"{where}.options")
    made: Measurement = make(Measurement, values, where, name=name)
    return made if made.label else replace(made, label=name)


def _findings(told: Any) -> tuple[Finding, ...]:
    if not isinstance(told, list):
        raise ConfigError("findings are a list: write [[finding]] with two brackets")
    found = []
    for number, entry in enumerate(told, start=1):
        where = f"finding {number}"
        values = table(entry, where)
        check_keys(values, ("statement", "paper", "holds_if", "if_not"), f"{where}: ")
        check_present(values, ("statement", "paper", "holds_if"), f"{where}: ")
        claims = texts(values["holds_if"], f"{where}: holds_if")
        if not claims:
            raise ConfigError(f"{where}: holds_if needs one comparison or more")
        words = [values.get(key, "") for key in ("statement", "paper", "if_not")]
        statement, paper, if_not = (
            " ".join(text.split()) for text in texts(words, f"{where}: statement, paper, if_not")
        )
        found.append(Finding(statement, paper, tuple(map(parse_claim, claims)), if_not))
    return tuple(found)
