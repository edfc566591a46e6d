"""Run a study: train what is missing, measure it, decide what holds."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffenc.errors import ConfigError
from diffenc.evals.choices.extraction import READING
from diffenc.mllm.model import DiffusionVLM
from diffenc.storage.names import is_file
from diffenc.storage.reading import read_json
from diffenc.storage.schema import make
from diffenc.storage.writing import make_folder, write_json
from diffenc.studies.spreads import Spread
from diffenc.studies.vlm.estimate import Work, work_of
from diffenc.studies.vlm.findings import DecidedFinding, Key, decide
from diffenc.studies.vlm.measure import (
    EDITIONS,
    UNTOLD,
    Measured,
    has_cider,
    measure,
    write_captions,
)
from diffenc.studies.vlm.measurements import Measurement
from diffenc.studies.vlm.plan import StudyPlan
from diffenc.studies.vlm.workshop import Workshop, digest_of

Progress = Callable[[float, float, str], None]
"""Function that is called with the work done, all work, and a text on what is being done."""


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
    findings: tuple[DecidedFinding, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    trained: int = 0
    fresh: int = 0

    def figure(self, key: Key) -> Spread | None:
        """A figure by training, measurement and name; None where there is none."""
        cell = self.cell(key[0], key[1])
        return None if cell is None else cell.figures.get(key[2])

    def cell(self, training: str, measurement: str) -> Cell | None:
        """Results of a measurement of a training; None if there are none."""
        for cell in self.cells:
            if (cell.training, cell.measurement) == (training, measurement):
                return cell
        return None

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


def study_vlm(
    plan: StudyPlan,
    *,
    work: "str | os.PathLike[str]",
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> VlmStudy:
    """Run a study, or what is missing of it.

    Trainings and what was measured of them are kept in `work`: a study that was interrupted goes
    on, within a training too, and studies that need the same training share it.

    Args:
        plan: Plan of the trainings, measurements and claims.
        work: Folder that keeps trained models and results.
        device: Device that the models run on; None is CUDA if there is one, otherwise the CPU.
        progress: Function that is called with the work that is done and all work, both in estimated
            seconds, and a text that says what is being done; None reports nothing.

    Raises:
        BackboneError: A language model or an encoder is missing. Trainings that need a CLIP which
            is missing are left out instead, and named in the result.
        ConfigError: Nothing is left to be trained.
        OutputError: The folder cannot be written.
    """
    workshop = Workshop(plan, work, device=device)
    missing = workshop.missing()
    if len(missing) == len(plan.trainings):
        reason = next(iter(missing.values()))
        raise ConfigError(f"no training of the study {plan.name!r} can be done: {reason}")
    run = _Run(plan, workshop, work_of(plan, missing), progress)
    measured = {
        (training.name, measurement.name): [
            run.measured(training.name, measurement, seed) for seed in range(plan.seeds)
        ]
        for training, measurement in plan.pairs(missing)
    }
    cells = tuple(_cell(*names, of_seeds) for names, of_seeds in measured.items())
    study = VlmStudy(
        plan,
        cells,
        missing=missing,
        trained=plan.seeds * (len(plan.trainings) - len(missing)),
        fresh=len(workshop.fresh),
    )
    return replace(
        study,
        findings=tuple(decide(each, study.figure, answers=True) for each in plan.findings),
    )


class _Run:
    """Work of a study, with one model at a time in memory."""

    def __init__(
        self,
        plan: StudyPlan,
        workshop: Workshop,
        work: Work,
        progress: Progress | None,
    ) -> None:
        self.plan, self.workshop, self.work, self.progress = plan, workshop, work, progress
        self._done: dict[tuple[str, ...], float] = {}
        self._loaded: tuple[Any, DiffusionVLM] | None = None

    def measured(self, training: str, measurement: Measurement, seed: int) -> Measured:
        """Figures, from the work folder where they are there."""
        path = self._path(training, measurement, seed)
        self._train(training, seed)
        writer = measurement.writer
        if writer is not None:
            self._train(writer, seed)
        measured = read_measured(path)
        if measured is None:
            self._tell((training, measurement.name, str(seed)), 0.0, f"measuring {training}")
            captioner = None if writer is None else self._captioner(writer, seed)
            generate = self._load_later(training, seed, measurement)
            measured = measure(measurement, generate, seed=seed, writer=captioner)
            make_folder(path.parent)
            write_json(path, asdict(measured), indent=1)
        self._tell((training, measurement.name, str(seed)), 1.0, f"measured {training}")
        return measured

    def _train(self, name: str, seed: int) -> None:
        for each in self.plan.ancestors(name):
            place = (each, str(seed))
            if self._done.get(place) != 1.0:
                self.workshop.trained(each, seed, progress=self._step_of(each, seed))
                self._tell(place, 1.0, f"training {each}, seed {seed}")

    def _step_of(self, name: str, seed: int) -> Callable[[int, int], None]:
        def step(done: int, total: int) -> None:
            self._tell((name, str(seed)), done / total, f"training {name}, seed {seed}")

        return step

    def _captioner(self, name: str, seed: int) -> Callable[[Sequence[Image.Image]], list[str]]:
        def write(pictures: Sequence[Image.Image]) -> list[str]:
            return write_captions(self._model(name, seed, {}).generate, pictures)

        return write

    def _load_later(self, name: str, seed: int, measurement: Measurement) -> Any:
        """`generate` of a model that is loaded when it is called: a writer comes before it."""

        def generate(*args: Any, **kwargs: Any) -> list[str]:
            return self._model(name, seed, measurement.options).generate(*args, **kwargs)

        return generate

    def _model(self, name: str, seed: int, options: Any) -> DiffusionVLM:
        key = (name, seed, json.dumps(dict(options), sort_keys=True))
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # frees the one before
            folder = self.workshop.trained(name, seed)
            device = self.workshop.device
            if device is None:
                device = "cuda" if torch.cuda.is_available() else "cpu"
            vlm = DiffusionVLM.from_pretrained(folder, device=device, **options)
            self._loaded = key, vlm
        return self._loaded[1]

    def _path(self, training: str, measurement: Measurement, seed: int) -> Path:
        names = ("name", "label", "of")
        content = {k: v for k, v in asdict(measurement).items() if k not in names}
        for name in ("crowds", "untold"):  # results from before there were such stay valid
            if not content[name]:
                del content[name]
        if measurement.untold:
            content["untold"] = UNTOLD
        writer = measurement.writer
        content["prompts"] = measurement.prompts.replace(f"by {writer}", "by another")
        identity = digest_of(
            {
                "training": self.workshop.identity(training, seed),
                "writer": None if writer is None else self.workshop.identity(writer, seed),
                "measurement": content,
                "seed": seed,
                "cider": has_cider(),
                "edition": EDITIONS.get(measurement.kind, 1),
                **({"reading": READING} if measurement.kind == "mmvp" else {}),
            }
        )
        return self.workshop.folder / "measured" / f"{identity}.json"

    def _tell(self, place: tuple[str, ...], share: float, what: str) -> None:
        self._done[place] = share
        if self.progress is not None:
            done = sum(
                self.work.seconds.get(each[:-1], 0.0) * part for each, part in self._done.items()
            )
            self.progress(done, self.work.total, what)


def _cell(training: str, measurement: str, measured: Sequence[Measured]) -> Cell:
    figures: dict[str, Spread | None] = {}
    for name in measured[0].figures:
        values = [each.figures.get(name) for each in measured]
        known = [value for value in values if value is not None]
        figures[name] = Spread(tuple(known)) if len(known) == len(values) else None
    return Cell(training, measurement, figures, measured[0].examples)


def read_measured(path: Path) -> Measured | None:
    """Read figures that were measured before; None if there are none.

    Raises:
        ConfigError: The file was changed into something else.
    """
    if not is_file(path):
        return None
    try:
        measured: Measured = make(Measured, read_json(path))
    except ConfigError as error:
        raise ConfigError(
            f"{path} is not what a study measured: {error}. Remove it to measure again"
        ) from error
    return measured
