"""Run a study: train what is missing, measure it, decide what holds."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
from diffenc.studies.results import Spread
from diffenc.studies.vlm.estimate import Work, work_of
from diffenc.studies.vlm.findings import decide
from diffenc.studies.vlm.measure import Measured, has_cider, measure, write_captions
from diffenc.studies.vlm.plan import Measurement, StudyPlan
from diffenc.studies.vlm.results import Cell, VlmStudy, find_figure
from diffenc.studies.vlm.trainings import Training
from diffenc.studies.vlm.workshop import Workshop, digest_of

Progress = Callable[[float, float, str], None]
"""Function that is called with the work done, all work, and a text on what is being done."""


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
    run = _Run(plan, workshop, missing, progress)
    measured = {
        (training.name, measurement.name): [
            run.measured(training.name, measurement, seed) for seed in range(plan.seeds)
        ]
        for training, measurement in run.possible()
    }
    cells = tuple(_cell(*names, found) for names, found in measured.items())
    findings = tuple(decide(each, lambda key: find_figure(cells, key)) for each in plan.findings)
    total = plan.seeds * (len(plan.trainings) - len(missing))
    return VlmStudy(plan, cells, findings, missing, total, len(workshop.fresh))


class _Run:
    """Work of a study, with one model at a time in memory."""

    def __init__(
        self,
        plan: StudyPlan,
        workshop: Workshop,
        missing: dict[str, str],
        progress: Progress | None,
    ) -> None:
        self.plan, self.workshop, self.missing, self.progress = plan, workshop, missing, progress
        self.work: Work = work_of(plan, missing)
        self._done: dict[tuple[str, ...], float] = {}
        self._loaded: tuple[Any, DiffusionVLM] | None = None

    def possible(self) -> list[tuple[Training, Measurement]]:
        """Pairs of a training and a measurement for which nothing is missing."""
        return [
            (training, measurement)
            for training, measurement in self.plan.pairs()
            if training.name not in self.missing and measurement.writer not in self.missing
        ]

    def measured(self, training: str, measurement: Measurement, seed: int) -> Measured:
        """Figures, from the work folder where they are there."""
        path = self._path(training, measurement, seed)
        self._train(training, seed)
        writer = measurement.writer
        if writer is not None:
            self._train(writer, seed)
        found = _read(path)
        if found is None:
            self._tell((training, measurement.name, str(seed)), 0.0, f"measuring {training}")
            captioner = None if writer is None else self._captioner(writer, seed)
            generate = self._load_later(training, seed, measurement)
            found = measure(measurement, generate, seed=seed, writer=captioner)
            _write(path, found)
        self._tell((training, measurement.name, str(seed)), 1.0, f"measured {training}")
        return found

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
        told = {k: v for k, v in asdict(measurement).items() if k not in ("name", "label", "of")}
        writer = measurement.writer
        told["prompts"] = measurement.prompts.replace(f"by {writer}", "by another")
        identity = digest_of(
            {
                "training": self.workshop.identity(training, seed),
                "writer": None if writer is None else self.workshop.identity(writer, seed),
                "measurement": told,
                "seed": seed,
                "cider": has_cider(),
                **({"reading": READING} if measurement.kind == "mmvp" else {}),
            }
        )
        return self.workshop.folder / "measured" / f"{identity}.json"

    def _tell(self, place: tuple[str, ...], share: float, what: str) -> None:
        self._done[place] = share
        if self.progress is not None:
            done = sum(self.work.units.get(each, 0.0) * part for each, part in self._done.items())
            self.progress(done, self.work.total, what)


def _cell(training: str, measurement: str, found: Sequence[Measured]) -> Cell:
    figures: dict[str, Spread | None] = {}
    for name in found[0].figures:
        values = [each.figures.get(name) for each in found]
        known = [value for value in values if value is not None]
        figures[name] = Spread(tuple(known)) if len(known) == len(values) else None
    return Cell(training, measurement, figures, found[0].examples)


def _read(path: Path) -> Measured | None:
    """Read figures that were measured before; None if there are none.

    Raises:
        ConfigError: The file was changed into something else.
    """
    if not is_file(path):
        return None
    try:
        found: Measured = make(Measured, read_json(path))
    except ConfigError as error:
        raise ConfigError(
            f"{path} is not what a study measured: {error}. Remove it to measure again"
        ) from error
    return found


def _write(path: Path, found: Measured) -> None:
    make_folder(path.parent)
    write_json(path, asdict(found), indent=1)
