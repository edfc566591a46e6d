"""Results of a study, as plain values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from diffenc.studies.results import Spread
from diffenc.studies.vlm.claims import Key
from diffenc.studies.vlm.findings import DecidedFinding
from diffenc.studies.vlm.plan import StudyPlan


@dataclass(frozen=True, slots=True)
class Cell:
    """Results of one measurement of one training.

    Attributes:
        training: Name of the training.
        measurement: Name of the measurement.
        figures: Values of each figure over seeds, by name; None if some seed gave none.
        examples: Examples of the first seed: prompts of the encoder, and answers.
    """

    training: str
    measurement: str
    figures: Mapping[str, Spread | None]
    examples: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class VlmStudy:
    """A study that was run.

    Attributes:
        plan: Plan of the study.
        cells: Results of each measurement of each training.
        findings: Findings of the plan with their verdicts.
        missing: Reason why a training could not be done, by name of the training.
        trained: Number of trainings that are done, each seed counted.
        fresh: Number of trainings that were done in this run; the others were there already.
    """

    plan: StudyPlan
    cells: tuple[Cell, ...]
    findings: tuple[DecidedFinding, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    trained: int = 0
    fresh: int = 0

    def figure(self, key: Key) -> Spread | None:
        """A figure by training, measurement and name; None where there is none."""
        return find_figure(self.cells, key)

    def cell(self, training: str, measurement: str) -> Cell | None:
        """Results of a measurement of a training; None if there are none."""
        return find_cell(self.cells, training, measurement)

    def to_dict(self) -> dict[str, Any]:
        """Every number, as JSON holds it."""
        return {
            "plan": self.plan.to_dict(),
            "cells": [asdict(cell) for cell in self.cells],
            "findings": [asdict(each) for each in self.findings],
            "missing": dict(self.missing),
            "trained": self.trained,
            "fresh": self.fresh,
        }


def find_cell(cells: tuple[Cell, ...], training: str, measurement: str) -> Cell | None:
    """Results of a measurement of a training; None if there are none."""
    for cell in cells:
        if (cell.training, cell.measurement) == (training, measurement):
            return cell
    return None


def find_figure(cells: tuple[Cell, ...], key: Key) -> Spread | None:
    """A figure by training, measurement and name; None where there is none."""
    cell = find_cell(cells, key[0], key[1])
    return None if cell is None else cell.figures.get(key[2])
